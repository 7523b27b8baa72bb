// A group of layers that read one input: what it computes, and its gradients, as jobs around the library's large
// products.
//
// The formulas are those of kernels/base.py, the arguments those of ops.py. Small tensors may be float32 beside
// bfloat16 ones.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include "gain.h"
#include "operands.h"
#include "weight.h"

namespace {

using Maybes = c10::List<Maybe>;

// The weights of a group: of each layer the tensors that hold it; formats and layouts as ops.py has them.
std::vector<Weight> weights_of(at::TensorList tensors, const c10::List<std::string> &formats, at::IntArrayRef layouts,
                               at::ScalarType dtype) {
  std::vector<Weight> found;
  for (const std::string format : formats) {
    if (format.empty()) {
      found.emplace_back(tensors[0]);
      tensors = tensors.slice(1);
    } else {
      const size_t count = size_t(layouts[0]);
      found.emplace_back(tensors.slice(0, count), format, layouts.slice(1, 4), dtype);
      tensors = tensors.slice(count), layouts = layouts.slice(5);
    }
  }
  return found;
}

// The tensor [..., n] as [M, n].
Tensor flat(const Tensor &t, int64_t m) { return t.reshape({m, t.size(-1)}); }

// The sizes of a tensor, the last one replaced.
std::vector<int64_t> sizes(const Tensor &t, int64_t last) {
  std::vector<int64_t> found = t.sizes().vec();
  found.back() = last;
  return found;
}

// What the gains make of a group: of each adapter gain * left, and of each layer its gain, if any.
struct Scaled {
  std::vector<Tensor> lefts;
  std::vector<Maybe> layers;
};

Scaled scale(const Maybes &gains, at::TensorList lefts, at::IntArrayRef counts, const Tensor &x) {
  Scaled found = {smalls(lefts, x), {}};
  size_t j = 0;
  for (const int64_t count : counts) {
    Maybe layer;
    for (int64_t of = 0; of < count; ++of, ++j) {
      const Maybe gain = wide(gains[j]);
      if (!gain) continue;
      found.lefts[j] = scale_rows(found.lefts[j], *gain);
      layer = layer ? Maybe(layer->add(*gain).sub_(1)) : gain;
    }
    found.layers.push_back(layer);
  }
  return found;
}

std::vector<Tensor> forward(const Tensor &x, at::TensorList tensors, c10::List<std::string> formats,
                            at::IntArrayRef layouts, const Maybes &biases, const Maybes &gains, at::TensorList lefts,
                            at::TensorList rights, at::IntArrayRef counts, at::ArrayRef<double> p,
                            at::ArrayRef<double> scales, const Maybe &seed) {
  const std::vector<Weight> weights = weights_of(tensors, formats, layouts, x.scalar_type());
  const int64_t m = c10::multiply_integers(x.sizes().slice(0, size_t(x.dim() - 1)));
  const Tensor wide_x = rows(flat(x, m));
  const std::vector<Tensor> small = smalls(rights, x);
  const Scaled scaled = scale(gains, lefts, counts, x);
  const int64_t drop = std::count_if(p.begin(), p.end(), [](double chance) { return chance > 0.0; });
  const Alike alike(rights, p, scales);
  const Tensor bits = x.new_empty({drop, m, (x.size(-1) + WORD - 1) / WORD}, x.options().dtype(at::kShort));
  std::vector<Adapter> adapters = masked(small, p, bits);
  for (size_t j = 0; j < adapters.size(); ++j) adapters[j].factor *= float(scales[j]);
  adapters = alike.select(std::move(adapters));
  Tensor s = x.new_empty({m, ranks(adapters)});
  Job down = make(NARROW, wide_x, s, std::move(adapters));
  if (seed) down.seed = uint64_t(seed->item<int64_t>());
  run(x.scalar_type(), {down});
  if (alike.any) s = alike.spread(s, rights);

  std::vector<Tensor> found = {s, bits};
  int64_t column = 0;
  size_t left = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Maybe bias = biases[i], gain = scaled.layers[i], plain = gain ? wide(bias) : std::nullopt;
    // addmm copies the bias to where it then adds the product: so may the rest be there, and takes no pass of its own.
    const bool before = counts[i] && bias && !gain && weights[i].adds_exactly(x, *bias);
    Tensor y = before ? x.new_empty({m, weights[i].out()}) : weights[i].linear(x, bias);
    if (counts[i]) {
      y = flat(y, m);
      std::vector<Adapter> mine;
      int64_t r = 0;
      for (int64_t j = 0; j < counts[i]; ++j) {
        mine.push_back(adapter(scaled.lefts[left++], 1));
        r += mine.back().r;
      }
      Job job = make(EXPAND, y, s.narrow(1, column, r), std::move(mine));
      job.gain = floats(gain);
      job.bias = floats(plain);
      if (before) job.start = bias->const_data_ptr<float>();
      run(y.scalar_type(), {job});  // while y is near
      if (before) weights[i].add_product(y, flat(x, m));
      column += r;
      y = at::_unsafe_view(y, sizes(x, y.size(1)));  // not a view: that may not be written to
    }
    found.push_back(y);
  }
  return found;
}

// One layer's share of backward; dls are one an adapter. Undefined is what is not wanted.
struct Share {
  Tensor dy, base, total, dot;  // base: gain * dy, or dy
  std::vector<Tensor> dls;
};

// ds, and what depends on dy alone.
std::vector<Share> grad_up(const Maybes &dys, const Maybes &ys, const Tensor &s, const Tensor &ds,
                           const std::vector<bool> &needs_total, const std::vector<Weight> &weights,
                           const c10::List<bool> &needed, const Scaled &scaled, const Maybes &gains,
                           at::TensorList lefts, at::IntArrayRef counts, at::ArrayRef<double> scales) {
  std::vector<Share> shares(dys.size());
  std::vector<Tensor> alive;
  std::vector<Job> jobs;
  int64_t column = 0;
  size_t left = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    Share &share = shares[i];
    const Maybe dy = dys[i], y = ys[i], &gain = scaled.layers[i];
    if (dy) share.dy = flat(*dy, s.size(0));
    if (dy && !gain) share.base = share.dy;
    if (!counts[i]) {
      if (dy && needs_total[i]) share.total = share.dy.sum(0);
      continue;
    }
    std::vector<Adapter> in, out;
    int64_t r = 0;
    for (int64_t j = 0; j < counts[i]; ++j, ++left) {
      const bool plain = lefts[left].scalar_type() == s.scalar_type() && !gains[left];
      share.dls.push_back(s.new_empty(lefts[left].sizes(), plain ? s.options() : s.options().dtype(at::kFloat)));
      in.push_back(adapter(scaled.lefts[left], 1, float(scales[left])));
      out.push_back(adapter(share.dls.back(), 1));
      r += in.back().r;
    }
    const Tensor mine = ds.narrow(1, column, r), with = s.narrow(1, column, r);
    column += r;
    if (!dy) {
      mine.zero_();
      continue;
    }
    const Tensor d = rows(share.dy);
    alive.push_back(d);
    jobs.push_back(make(NARROW, d, mine, std::move(in)));
    Job job = make(OUTER, d, with, std::move(out));
    if (gain && (needed[1 + i] || d.size(1) <= weights[i].in())) {
      share.base = s.new_empty(d.sizes());
      job.gain = floats(gain);
      job.base = share.base.data_ptr();
    }
    const auto sums = [&] { return s.new_empty({d.size(1)}, s.options().dtype(at::kFloat)); };
    if (needs_total[i]) job.total = (share.total = sums()).data_ptr<float>();
    if (y) {
      alive.push_back(rows(flat(*y, s.size(0))));
      job.y = alive.back().data_ptr();
      job.ldy = alive.back().stride(0);
      job.dot = (share.dot = sums()).data_ptr<float>();
    }
    jobs.push_back(std::move(job));
  }
  if (!jobs.empty()) run(s.scalar_type(), jobs);
  return shares;
}

// The sum of gain * dy W over layers.
Tensor product_with_weights(const std::vector<Share> &shares, const Scaled &scaled,
                            const std::vector<Weight> &weights) {
  Tensor dx;
  for (size_t i = 0; i < shares.size(); ++i) {
    const Share &share = shares[i];
    if (share.base.defined())
      weights[i].add_mm(dx, share.base);
    else if (share.dy.defined())
      weights[i].add_mm(dx, share.dy, scaled.layers[i]);
  }
  return dx;
}

std::vector<Tensor> backward(const Maybes &dys, const Maybes &ys, const Tensor &s, const Maybe &bits,
                             at::TensorList inputs, c10::string_view activation, at::TensorList tensors,
                             c10::List<std::string> formats, at::IntArrayRef layouts, const Maybes &biases,
                             const Maybes &gains, at::TensorList lefts, at::TensorList rights, at::IntArrayRef counts,
                             at::ArrayRef<double> p, at::ArrayRef<double> scales, const c10::List<bool> &needed) {
  const std::vector<Weight> weights = weights_of(tensors, formats, layouts, s.scalar_type());
  const size_t n = weights.size(), count = rights.size(), m = size_t(s.size(0));
  const size_t of_bias = 1 + n, of_gain = of_bias + n, of_left = of_gain + count, of_right = of_left + count;
  const bool needs_x = needed[0];
  bool needs_right = false;
  std::vector<bool> needs_total;
  for (size_t j = 0; j < count; ++j) needs_right |= needed[of_right + j];
  for (size_t i = 0; i < n; ++i) needs_total.push_back(needed[of_bias + i] || Maybe(ys[i]));
  const Scaled scaled = scale(gains, lefts, counts, s);

  const Tensor ds = s.new_empty(s.sizes());
  std::vector<Share> shares =
      grad_up(dys, ys, s, ds, needs_total, weights, needed, scaled, gains, lefts, counts, scales);

  // dx, through an activation on to its sources; and the gradients of rights, which read x.
  const std::vector<Tensor> small = smalls(rights, ds), drights = needs_right ? gradients(rights, ds) : small;
  const Alike alike(rights, p, scales);
  Tensor summed = ds;
  std::vector<Tensor> first, sources;
  std::vector<Job> jobs;
  Tensor x = inputs.empty() || !activation.empty() ? Tensor() : rows(flat(inputs[0], int64_t(m)));
  if (needs_x) {
    Tensor dx = product_with_weights(shares, scaled, weights);
    for (size_t i = 0; i < n; ++i)
      if (!needed[1 + i]) shares[i].base.reset();  // before more is made: a step's memory may be at its peak here
    if (alike.any) summed = alike.sum(ds, rights);
    Job job = make(EXPAND, dx, summed, alike.select(masked(small, p, bits)));
    if (activation.empty()) {
      Maybe given;
      for (size_t i = 0; i < n && !given; ++i) given = dys[i];
      first = {dx.view(sizes(*given, dx.size(1)))};
      jobs.push_back(std::move(job));
    } else {
      for (const Tensor &source : inputs) sources.push_back(source.contiguous());
      const Tensor &h = sources[0];
      x = at::empty_like(dx);
      first = {dx.view(h.sizes())};
      job.f = activation.starts_with("gelu_tanh") ? GELU_TANH : activation.starts_with("gelu") ? GELU : SILU;
      job.h = h.data_ptr();
      job.x = x.data_ptr();
      if (sources.size() > 1) {
        first.push_back(at::empty_like(h));
        job.u = sources[1].data_ptr();
        job.du = first[1].data_ptr();
      }
      run(s.scalar_type(), {job});
    }
  } else {
    first = {s.new_empty({0})};
  }
  if (needs_right) jobs.push_back(make(OUTER, x, ds, masked(drights, p, bits)));
  if (!jobs.empty()) run(s.scalar_type(), jobs);

  // In the order of the operands.
  const std::vector<Tensor> small_lefts = smalls(lefts, s);
  std::vector<Tensor> own(needed.size() - 1);
  for (size_t i = 0, left = 0; i < n; left += size_t(counts[i++])) {
    const Share &share = shares[i];
    if (!share.dy.defined()) continue;
    const Maybe bias = biases[i];
    if (needed[1 + i]) own[i] = at::mm(share.base.t(), x);
    if (needed[of_bias + i]) own[of_bias - 1 + i] = share.total.to(bias->scalar_type());
    std::vector<LeftGradient> lefts_of;
    for (size_t j = left; j < left + size_t(counts[i]); ++j)
      lefts_of.push_back(left_gradient(share.dls[j - left], small_lefts[j], wide(gains[j]), share.dot.defined()));
    Tensor dgain;
    if (share.dot.defined()) {
      Tensor low_rank;
      for (size_t j = left; j < left + size_t(counts[i]); ++j) {
        const Tensor &dot = lefts_of[j - left].dot;
        const Tensor part = gains[j] ? dot.mul(*wide(gains[j])) : dot;
        low_rank = low_rank.defined() ? low_rank.add(part) : part;
      }
      dgain = grad_gain(share.dot.sub(low_rank), share.total, bias, *scaled.layers[i], share.dy, x, weights[i]);
    }
    for (size_t j = left; j < left + size_t(counts[i]); ++j) {
      const LeftGradient &of = lefts_of[j - left];
      const Maybe gain = gains[j];
      if (needed[of_left + j]) own[of_left - 1 + j] = of.grad.to(lefts[j].scalar_type());
      if (needed[of_gain + j]) own[of_gain - 1 + j] = dgain.add(of.dot).to(gain->scalar_type());
      if (needed[of_right + j]) own[of_right - 1 + j] = drights[j].to(rights[j].scalar_type());
    }
  }
  for (Tensor &one : own) first.push_back(one.defined() ? std::move(one) : s.new_empty({0}));
  return first;
}

}  // namespace
