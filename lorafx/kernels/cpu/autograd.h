// The gradient of a group, as lorafx/kernels/function.py has it for other providers, without the interpreter: between
// two large products the caches hold nothing that it needs.
#pragma once

#include <algorithm>
#include <numeric>

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "group.h"

namespace {

using Tensors = std::vector<Tensor>;
using torch::autograd::AutogradContext;

// As in lorafx/kernels/once.py.
constexpr const char *TWICE =
    "lorafx: what lowering put in the place of adapted layers is differentiated once. For second derivatives "
    "(create_graph=True) compute by plain torch: lorafx.lower(gm, \"reference\")";
constexpr const char *BATCHED =
    "lorafx: what lowering put in the place of adapted layers takes one gradient, not a batch of them. For "
    "is_grads_batched=True, or a Jacobian with vectorize=True, compute by plain torch: "
    "lorafx.lower(gm, \"reference\")";

// The operators are called by their names, so that what traces a graph sees them.
template <typename Signature> c10::TypedOperatorHandle<Signature> named(const char *name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Maybes maybes(at::TensorList tensors) {
  Maybes found;
  for (const Tensor &t : tensors) found.push_back(t.defined() ? Maybe(t) : std::nullopt);
  return found;
}

Tensors defined_or_not(const Maybes &maybes) {
  Tensors found;
  for (const Maybe one : maybes) found.push_back(one.value_or(Tensor()));
  return found;
}

// The tensors of a group, or one of something for each; undefined is what is not there.
struct Operands {
  Tensors weights, biases, gains, lefts, rights;

  static Operands split(at::TensorList flat, size_t weights, size_t layers, size_t adapters) {
    const auto next = [&](size_t count) {
      Tensors found = flat.slice(0, count).vec();
      flat = flat.slice(count);
      return found;
    };
    Operands found;
    found.weights = next(weights), found.biases = next(layers), found.gains = next(adapters);
    found.lefts = next(adapters), found.rights = next(adapters);
    return found;
  }

  Tensors flat() const {
    Tensors found;
    for (const Tensors *each : {&weights, &biases, &gains, &lefts, &rights})
      found.insert(found.end(), each->begin(), each->end());
    return found;
  }
};

// What of a group is neither tensor nor weight.
struct Group {
  c10::List<std::string> formats;
  c10::List<int64_t> layouts, counts;
  c10::List<double> p, scales;

  // Of each layer the place of its weight among the tensors that hold weights, or -1: what is packed has no gradient.
  std::vector<int64_t> dense() const {
    std::vector<int64_t> found;
    int64_t place = 0;
    size_t layout = 0;
    for (const std::string format : formats) {
      found.push_back(format.empty() ? place : -1);
      place += format.empty() ? 1 : layouts[layout];
      if (!format.empty()) layout += 5;
    }
    return found;
  }

  int64_t adapters() const { return std::accumulate(counts.begin(), counts.end(), int64_t(0)); }
};

// Which gradients are wanted, as the operators take it: of x, then of weights, biases, gains, lefts and rights.
struct Needs {
  c10::List<bool> needed;
  const Group &group;

  bool any(size_t from, size_t count) const {
    for (size_t i = from; i < from + count; ++i)
      if (needed[i]) return true;
    return false;
  }
  bool any() const { return any(0, needed.size()); }
  // Whether anything but x itself depends on x.
  bool input() const {
    const size_t n = group.counts.size(), count = size_t(group.adapters());
    return any(1, n) || any(1 + 2 * n, count) || any(1 + 2 * n + 2 * count, count);
  }
  // The layers of which a gain trains.
  std::vector<size_t> gains() const {
    std::vector<size_t> found;
    const size_t n = group.counts.size();
    for (size_t i = 0, j = 1 + 2 * n; i < n; j += size_t(group.counts[i++]))
      if (any(j, size_t(group.counts[i]))) found.push_back(i);
    return found;
  }
  // Whether a layer's output depends on nothing that trains.
  bool idle(size_t i) const {
    return !(group.counts[i] || needed[0] || needed[1 + i] || needed[1 + group.counts.size() + i]);
  }
};

struct Call {
  const Tensor &x;
  at::TensorList sources;
  std::string recipe, activation;
  Operands operands;
  Group group;
  Needs needs;

  // Whether the gradient goes on to the sources, in the place of x.
  bool passes() const { return needs.needed[0] && !activation.empty(); }
  // What autograd is to see: all that gets a gradient where it needs one.
  Tensors inputs() const {
    Tensors found = passes() ? sources.vec() : Tensors{x};
    for (const Tensor &t : operands.flat())
      if (t.defined()) found.push_back(t);
    return found;
  }
};

struct LowRankLinear : torch::autograd::Function<LowRankLinear> {
  static constexpr bool is_traceable = true;  // compiled autograd; it knows no mark_non_differentiable

  static Tensors forward(AutogradContext *ctx, at::TensorList, const Call &call) {
    const auto &[x, sources, recipe, activation, operands, group, needs] = call;
    static const auto forward_ = named<decltype(::forward)>("lorafx::cpu_group");
    const std::vector<double> p = group.p.vec();
    Maybe seed;
    if (std::any_of(p.begin(), p.end(), [](double chance) { return chance > 0.0; }))
      seed = x.new_empty({1}, x.options().dtype(at::kLong)).random_();
    Tensors found = forward_.call(x, operands.weights, group.formats, group.layouts.vec(), maybes(operands.biases),
                                  maybes(operands.gains), operands.lefts, operands.rights, group.counts.vec(), p,
                                  group.scales.vec(), seed);
    const Tensor s = found[0], bits = seed ? found[1] : Tensor();
    found.erase(found.begin(), found.begin() + 2);
    if (!needs.any()) return found;

    Tensors kept;
    const bool passes = call.passes();
    if (passes || (needs.input() && !sources.empty()))
      kept = sources.vec();
    else if (needs.input())
      kept = {x};
    auto &data = ctx->saved_data;
    data["inputs"] = int64_t(kept.size());
    kept.insert(kept.end(), {s, bits});
    const Tensors flat = operands.flat();
    kept.insert(kept.end(), flat.begin(), flat.end());
    for (const size_t i : needs.gains()) kept.push_back(found[i]);
    ctx->save_for_backward(std::move(kept));
    ctx->set_materialize_grads(false);
    data["weights"] = int64_t(operands.weights.size());
    data["recipe"] = passes ? std::string() : recipe, data["activation"] = passes ? activation : std::string();
    data["formats"] = group.formats, data["layouts"] = group.layouts, data["counts"] = group.counts;
    data["p"] = group.p, data["scales"] = group.scales, data["needed"] = needs.needed;
    return found;
  }

  static Tensors backward(AutogradContext *ctx, const Tensors &dys) {
    for (const Tensor &dy : dys) TORCH_CHECK(!dy.defined() || !at::isBatchedTensor(dy), BATCHED);
    Tensors grads;
    {
      const at::AutoGradMode once(false);
      // Whatever autocast says where backward is called.
      const c10::impl::ExcludeDispatchKeyGuard full_precision(c10::autocast_dispatch_keyset);
      grads = gradients(ctx, dys);
    }
    if (!at::GradMode::is_enabled()) return grads;
    // Refused where they are differentiated, also what needs no gradient by itself (a loss linear in the output):
    // gradients depend on what was kept, and a penalty on them would silently have none.
    for (Tensor &grad : grads)
      if (grad.defined()) grad = grad.detach().requires_grad_();
    const auto refuse = c10::make_intrusive<torch::autograd::DelayedError>(TWICE, int64_t(grads.size()));
    return (*refuse)(std::move(grads));
  }

 private:
  static Tensors gradients(AutogradContext *ctx, const Tensors &dys) {
    static const auto backward_ = named<decltype(::backward)>("lorafx::cpu_group_backward");
    static const auto recompute = named<Tensor(c10::string_view, at::TensorList)>("lorafx::recompute");
    const auto &data = ctx->saved_data;
    const Group group = {data.at("formats").to<c10::List<std::string>>(), data.at("layouts").toIntList(),
                         data.at("counts").toIntList(), data.at("p").toDoubleList(), data.at("scales").toDoubleList()};
    const Needs needs = {data.at("needed").toBoolList(), group};
    const size_t n = dys.size(), count = size_t(group.adapters());
    const std::string recipe = data.at("recipe").toStringRef(), activation = data.at("activation").toStringRef();

    const Tensors saved = ctx->get_saved_variables();
    at::TensorList rest = saved;
    const auto next = [&](size_t of) {
      const at::TensorList found = rest.slice(0, of);
      rest = rest.slice(of);
      return found;
    };
    at::TensorList inputs = next(size_t(data.at("inputs").toInt()));
    const size_t first = activation.empty() ? 1 : inputs.size();
    const Tensor s = next(1)[0], bits = next(1)[0];
    const size_t of_weights = size_t(data.at("weights").toInt());
    const at::TensorList flat = next(of_weights + n + 3 * count);
    const Operands operands = Operands::split(flat, of_weights, n, count);
    Tensors ys(n);
    for (const size_t i : needs.gains()) ys[i] = next(1)[0];

    Tensors grads(first);
    Operands own = Operands::split(Tensors(flat.size()), of_weights, n, count);
    if (std::any_of(dys.begin(), dys.end(), [](const Tensor &dy) { return dy.defined(); })) {
      Tensor again;
      if (!recipe.empty() && !inputs.empty()) again = recompute.call(recipe, inputs), inputs = again;
      const Tensors found = backward_.call(
          maybes(dys), maybes(ys), s, bits.defined() ? Maybe(bits) : std::nullopt, inputs, activation, operands.weights,
          group.formats, group.layouts.vec(), maybes(operands.biases), maybes(operands.gains), operands.lefts,
          operands.rights, group.counts.vec(), group.p.vec(), group.scales.vec(), needs.needed);
      if (needs.needed[0]) std::copy_n(found.begin(), first, grads.begin());
      const auto take = [&](size_t i, const Tensor &dy, Tensor &grad) {
        if (dy.defined() && needs.needed[1 + i]) grad = found[first + i];
      };
      const std::vector<int64_t> dense = group.dense();
      for (size_t i = 0, j = 0; i < n; ++i) {
        if (dense[i] >= 0) take(i, dys[i], own.weights[size_t(dense[i])]);
        take(n + i, dys[i], own.biases[i]);
        for (const size_t end = j + size_t(group.counts[i]); j < end; ++j) {
          take(2 * n + j, dys[i], own.gains[j]);
          take(2 * n + count + j, dys[i], own.lefts[j]);
          take(2 * n + 2 * count + j, dys[i], own.rights[j]);
        }
      }
    }
    const Tensors of_operands = own.flat();
    for (size_t i = 0; i < flat.size(); ++i)
      if (flat[i].defined()) grads.push_back(of_operands[i]);
    grads.emplace_back();  // of what is no tensor
    return grads;
  }
};

Tensors linear(const Tensor &x, at::TensorList sources, c10::string_view recipe, c10::string_view activation,
               at::TensorList weights, const c10::List<std::string> &formats, const c10::List<int64_t> &layouts,
               const Maybes &biases, const Maybes &gains, at::TensorList lefts, at::TensorList rights,
               const c10::List<int64_t> &counts, const c10::List<double> &p, const c10::List<double> &scales) {
  const Operands operands = {weights.vec(), defined_or_not(biases), defined_or_not(gains), lefts.vec(), rights.vec()};
  const Group group = {formats, layouts, counts, p, scales};
  c10::List<bool> needed;
  const auto want = [&](const Tensor &t) {
    needed.push_back(at::GradMode::is_enabled() && t.defined() && t.requires_grad());
  };
  want(x);
  for (const int64_t place : group.dense()) want(place < 0 ? Tensor() : operands.weights[size_t(place)]);
  for (const Tensors *each : {&operands.biases, &operands.gains, &operands.lefts, &operands.rights})
    for (const Tensor &t : *each) want(t);

  const c10::impl::ExcludeDispatchKeyGuard full_precision(c10::autocast_dispatch_keyset);
  const Call call = {x, sources, std::string(recipe), std::string(activation), operands, group, {needed, group}};
  Tensors ys = LowRankLinear::apply(at::TensorList(call.inputs()), call);
  for (size_t i = 0; i < ys.size(); ++i)
    if (call.needs.any() && call.needs.idle(i)) ys[i] = ys[i].detach();
  return ys;
}

}  // namespace
