// The operators of ops.py for CPUs: the large products are the library's, the others jobs (jobs.h).
//
// What they compute is in kernels/base.py, what they take in ops.py. Small tensors may be float32 beside bfloat16 ones.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "jobs.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Maybes = c10::List<Maybe>;
constexpr double SMALL_GAIN = 1.0 / 16;  // as in gain.py

// The tensor with its rows in one piece each.
Tensor rows(const Tensor &t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

Maybe wide(const Maybe &vector) { return vector ? Maybe(vector->to(at::kFloat).contiguous()) : std::nullopt; }
const float *floats(const Maybe &t) { return t && t->numel() ? t->const_data_ptr<float>() : nullptr; }

// Factors as the kernels take them: float32, or of x's dtype.
std::vector<Tensor> smalls(at::TensorList factors, const Tensor &x) {
  std::vector<Tensor> found;
  for (const Tensor &t : factors) found.push_back(t.scalar_type() == at::kFloat ? t : t.to(x.scalar_type()));
  return found;
}

// Memory for their gradients.
std::vector<Tensor> gradients(at::TensorList factors, const Tensor &x) {
  std::vector<Tensor> found;
  for (const Tensor &t : factors)
    found.push_back(
        x.new_empty(t.sizes(), t.scalar_type() == x.scalar_type() ? x.options() : x.options().dtype(at::kFloat)));
  return found;
}

int64_t total(at::TensorList factors, int64_t rank) {
  int64_t sum = 0;
  for (const Tensor &t : factors) sum += t.size(rank);
  return sum;
}

// A factor with its ranks along a dimension.
Adapter adapter(const Tensor &small, int64_t rank, float factor = 1.0f) {
  return {small.data_ptr(),
          small.stride(rank),
          small.stride(1 - rank),
          small.scalar_type() == at::kFloat,
          small.size(rank),
          nullptr,
          0,
          0.0f,
          factor};
}

// Adapters [r, wide] with the masks of those that drop.
std::vector<Adapter> masked(const std::vector<Tensor> &factors, at::ArrayRef<double> p, const Maybe &bits) {
  std::vector<Adapter> found;
  int64_t mask = 0;
  for (size_t j = 0; j < factors.size(); ++j) {
    Adapter one = adapter(factors[j], 0, float(1.0 / (1.0 - p[j])));
    one.number = int64_t(j);
    one.p = float(p[j]);
    if (p[j] > 0.0) one.bits = static_cast<uint16_t *>(bits->data_ptr()) + mask++ * bits->stride(0);
    found.push_back(one);
  }
  return found;
}

Job make(Kind kind, const Tensor &big, const Tensor &s, std::vector<Adapter> adapters) {
  int64_t r = 0;
  for (const Adapter &one : adapters) r += one.r;
  TORCH_INTERNAL_ASSERT(s.scalar_type() == big.scalar_type() && s.size(0) == big.size(0) && s.size(1) == r);
  TORCH_INTERNAL_ASSERT(s.stride(1) == 1 || r == 1);
  return {kind,        big.data_ptr(), big.stride(0), big.size(0),
          big.size(1), s.data_ptr(),   s.stride(0),   std::move(adapters)};
}

void run(at::ScalarType dtype, const std::vector<Job> &jobs) {
  const int64_t threads = at::get_num_threads();
  if (dtype == at::kFloat)
    run<float>(jobs, threads);
  else if (dtype == at::kBFloat16)
    run<bf16>(jobs, threads);
  else
    TORCH_CHECK(false, "the compiled kernels are for float32 and bfloat16, not ", dtype);
}

std::tuple<Tensor, Tensor> down(const Tensor &given, at::TensorList rights, at::ArrayRef<double> p,
                                at::ArrayRef<double> scales, const Maybe &seed) {
  const Tensor x = rows(given);
  const std::vector<Tensor> small = smalls(rights, x);
  const int64_t drop = std::count_if(p.begin(), p.end(), [](double chance) { return chance > 0.0; });
  Tensor s = x.new_empty({x.size(0), total(rights, 0)});
  Tensor bits = x.new_empty({drop, x.size(0), (x.size(1) + LANES - 1) / LANES}, x.options().dtype(at::kShort));
  std::vector<Adapter> adapters = masked(small, p, bits);
  for (size_t j = 0; j < adapters.size(); ++j) adapters[j].factor *= float(scales[j]);
  Job job = make(NARROW, x, s, std::move(adapters));
  if (seed) job.seed = uint64_t(seed->item<int64_t>());
  run(x.scalar_type(), {job});
  return {s, bits};
}

std::vector<Tensor> up(const Tensor &x, const Tensor &s, at::TensorList weights, const Maybes &biases,
                       const Maybes &gains, at::TensorList lefts, at::IntArrayRef counts) {
  const std::vector<Tensor> small = smalls(lefts, x);
  std::vector<Tensor> ys;
  int64_t column = 0, left = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Maybe bias = biases[i], gain = wide(gains[i]), plain = gain ? wide(bias) : std::nullopt;
    const Tensor y = at::linear(x, weights[i], bias).reshape({s.size(0), weights[i].size(0)});
    std::vector<Adapter> adapters;
    int64_t r = 0;
    for (int64_t j = 0; j < counts[i]; ++j, ++left) {
      adapters.push_back(adapter(small[size_t(left)], 1));
      r += adapters.back().r;
    }
    Job job = make(EXPAND, y, s.narrow(1, column, r), std::move(adapters));
    job.gain = floats(gain);
    job.bias = floats(plain);
    run(y.scalar_type(), {job});  // while y is near
    column += r;
    ys.push_back(y);
  }
  return ys;
}

std::vector<Tensor> grad_up(const Maybes &dys, const Maybes &ys, const c10::List<bool> &needs_total, const Tensor &s,
                            const Maybes &gains, at::TensorList lefts, at::IntArrayRef counts,
                            at::ArrayRef<double> scales) {
  const Tensor ds = s.new_empty(s.sizes());
  const std::vector<Tensor> small = smalls(lefts, s), dlefts = gradients(lefts, s);
  std::vector<Tensor> found = {ds}, alive;
  found.insert(found.end(), dlefts.begin(), dlefts.end());
  std::vector<Job> jobs;
  int64_t column = 0;
  size_t left = 0;
  for (size_t i = 0; i < dys.size(); ++i) {
    const Maybe dy = dys[i], y = ys[i], gain = wide(gains[i]);
    std::vector<Adapter> in, out;
    int64_t r = 0;
    for (int64_t j = 0; j < counts[i]; ++j, ++left) {
      in.push_back(adapter(small[left], 1, float(scales[left])));
      out.push_back(adapter(dlefts[left], 1));
      r += in.back().r;
    }
    const int64_t n = dy ? dy->size(1) : 0;
    const Tensor base = gain && dy ? s.new_empty(dy->sizes()) : s.new_empty({0});
    const Tensor total = s.new_empty({needs_total[i] ? n : 0}, s.options().dtype(at::kFloat));
    const Tensor dot = s.new_empty({y ? n : 0}, s.options().dtype(at::kFloat));
    found.insert(found.end(), {base, total, dot});
    const Tensor mine = ds.narrow(1, column, r);
    if (dy) {
      const Tensor d = rows(*dy);
      jobs.push_back(make(NARROW, d, mine, std::move(in)));
      Job job = make(OUTER, d, s.narrow(1, column, r), std::move(out));
      job.gain = floats(gain);
      job.base = gain ? base.data_ptr() : nullptr;
      job.total = total.numel() ? total.data_ptr<float>() : nullptr;
      job.dot = dot.numel() ? dot.data_ptr<float>() : nullptr;
      alive.insert(alive.end(), {d, gain ? *gain : d});
      if (y) {
        alive.push_back(rows(*y));
        job.y = alive.back().data_ptr();
        job.ldy = alive.back().stride(0);
      }
      jobs.push_back(std::move(job));
    } else {
      mine.zero_();
      for (int64_t j = 1; j <= counts[i]; ++j) dlefts[left - size_t(j)].zero_();
    }
    column += r;
  }
  if (!jobs.empty()) run(s.scalar_type(), jobs);
  return found;
}

// The frozen layers' part of dx, and the job that adds the rest.
std::pair<Tensor, Job> begin_grad_x(at::TensorList bases, at::TensorList weights, const Tensor &ds,
                                    const std::vector<Tensor> &rights, at::ArrayRef<double> p, const Maybe &bits) {
  Tensor dx = at::mm(bases[0], weights[0]);
  for (size_t i = 1; i < bases.size(); ++i) dx.addmm_(bases[i], weights[i]);
  return {dx, make(EXPAND, dx, ds, masked(rights, p, bits))};
}

Tensor grad_x(at::TensorList bases, at::TensorList weights, const Tensor &ds, at::TensorList rights,
              at::ArrayRef<double> p, const Maybe &bits) {
  const std::vector<Tensor> small = smalls(rights, ds);
  const auto [dx, job] = begin_grad_x(bases, weights, ds, small, p, bits);
  run(dx.scalar_type(), {job});
  return dx;
}

// x, and the gradients of the sources.
std::vector<Tensor> grad_sources(at::TensorList bases, at::TensorList weights, const Tensor &ds, at::TensorList rights,
                                 at::ArrayRef<double> p, const Maybe &bits, c10::string_view name,
                                 at::TensorList sources) {
  const std::vector<Tensor> small = smalls(rights, ds);
  auto [dx, job] = begin_grad_x(bases, weights, ds, small, p, bits);
  const Tensor h = sources[0].contiguous(), u = sources.size() > 1 ? sources[1].contiguous() : Tensor();
  std::vector<Tensor> found = {at::empty_like(h), dx.view(h.sizes())};
  if (u.defined()) found.push_back(at::empty_like(u));
  job.f = name.starts_with("gelu_tanh") ? GELU_TANH : name.starts_with("gelu") ? GELU : SILU;
  job.h = h.data_ptr();
  job.x = found[0].data_ptr();
  if (u.defined()) job.u = u.data_ptr(), job.du = found[2].data_ptr();
  run(dx.scalar_type(), {job});
  return found;
}

std::vector<Tensor> grad_right(const Tensor &given, const Tensor &ds, at::TensorList rights, at::ArrayRef<double> p,
                               const Maybe &bits) {
  const Tensor x = rows(given);
  const std::vector<Tensor> found = gradients(rights, ds);
  run(x.scalar_type(), {make(OUTER, x, ds, masked(found, p, bits))});
  return found;
}

// weight right^T in float32 or better, right's dtype
Tensor product(const Tensor &weight, const Tensor &right) {
  const bool narrow = weight.scalar_type() == at::kBFloat16;
  if (weight.dim() == 2 && (narrow || weight.scalar_type() == at::kFloat) && right.scalar_type() == at::kFloat &&
      weight.stride(1) == 1) {
    // Beside bfloat16 the kernels round right to that: its rest is a second factor.
    const Tensor high = narrow ? right.to(at::kBFloat16).to(at::kFloat) : right,
                 rest = narrow ? right.sub(high) : Tensor();
    std::vector<Adapter> adapters = {adapter(high, 0)};
    if (narrow) adapters.push_back(adapter(rest, 0));
    const Tensor found = right.new_empty({weight.size(0), int64_t(adapters.size()) * right.size(0)});
    Job job = {NARROW,         weight.data_ptr(), weight.stride(0), weight.size(0),
               weight.size(1), found.data_ptr(),  found.stride(0),  std::move(adapters)};
    job.s_is_float = true;
    run(weight.scalar_type(), {job});
    return narrow ? found.narrow(1, 0, right.size(0)).add(found.narrow(1, right.size(0), right.size(0))) : found;
  }
  if (weight.scalar_type() == right.scalar_type()) return at::matmul(weight, right.mT());
  std::vector<Tensor> parts;  // few enough elements to stay in the caches
  for (const Tensor &part : weight.chunk(std::max<int64_t>(1, weight.numel() >> 19), -2))
    parts.push_back(at::matmul(part.to(right.scalar_type()), right.mT()));
  return at::cat(parts, -2);
}

// lorafx/variants/row_norm.py has the formula.
Tensor factored_norm(const Tensor &squares, const Tensor &weight, const Tensor &a, const Tensor &b, double scaling) {
  const auto dtype = c10::promoteTypes(c10::promoteTypes(weight.scalar_type(), a.scalar_type()), at::kFloat);
  const Tensor right = a.to(dtype), left = b.mul(scaling).to(dtype);
  const Tensor terms = product(weight, right).mul_(2).add_(at::matmul(left, at::matmul(right, right.mT())));
  return squares.add(terms.mul_(left).sum(-1)).clamp_min_(0).sqrt_().to(dtype);
}

// lorafx/kernels/gain.py has the formula.
Tensor grad_gain(const Tensor &dot, const Tensor &total, at::TensorList dlefts, at::TensorList lefts, const Maybe &bias,
                 const Tensor &gain, const Tensor &dy, const Tensor &x, const Tensor &weight) {
  Tensor found = dot.clone();
  for (size_t j = 0; j < lefts.size(); ++j) found = found.sub(dlefts[j].to(dot.scalar_type()).mul(lefts[j]).sum(1));
  if (bias) found = found.sub(bias->mul(total));
  const Tensor small = gain.abs().lt(SMALL_GAIN);
  found = found.div(gain.masked_fill(small, 1.0));
  if (small.any().item<bool>()) {
    const Tensor at = small.nonzero().flatten();
    const Tensor y = at::linear(x, weight.index_select(0, at));
    found.index_copy_(0, at, dy.index_select(1, at).mul(y).sum(0, false, found.scalar_type()));
  }
  return found.to(gain.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(lorafx, CPU, m) {
  m.impl("cpu_down", down);
  m.impl("cpu_up", up);
  m.impl("cpu_grad_up", grad_up);
  m.impl("cpu_grad_x", grad_x);
  m.impl("cpu_grad_right", grad_right);
  m.impl("cpu_grad_sources", grad_sources);
  m.impl("factored_norm", factored_norm);
  m.impl("grad_gain", grad_gain);
}
