// The operators of ops.py for CPUs: the large products are the library's, the others jobs (jobs.h, operands.h).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include "autograd.h"
#include "gain.h"
#include "group.h"
#include "operands.h"
#include "rounding.h"
#include "weight.h"

namespace {

// The end of lorafx/variants/row_norm.py's formula: products are weight right^T and right right^T.
Tensor add_terms(const Tensor &squares, const Tensor &products, const Tensor &among, const Tensor &b, double scaling) {
  const Tensor left = b.to(at::kFloat).contiguous(), found = left.new_empty({b.size(0)});
  const int64_t r = b.size(1);
  const float *const l = left.const_data_ptr<float>(), *const g = among.const_data_ptr<float>();
  const float *const w = products.const_data_ptr<float>();
  const double *const s = squares.const_data_ptr<double>();
  float *const norm = found.data_ptr<float>();
  at::parallel_for(0, b.size(0), 256, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const float *const row = l + i * r;
      vec sums = {};
      for (int64_t j = 0; j < r; j += LANES) {
        vec terms = 2.0f * load(w + i * r + j, r - j);
        for (int64_t q = 0; q < r; ++q) terms += float(scaling) * row[q] * load(g + q * r + j, r - j);
        sums += terms * load(row + j, r - j);
      }
      double sum = 0.0;
      for (int64_t lane = 0; lane < LANES; ++lane) sum += double(sums[lane]);
      norm[i] = float(std::sqrt(std::max(0.0, s[i] + scaling * sum)));
    }
  });
  return found;
}

// On the jobs, for a matrix beside float32 factors; anything else in torch's operators.
Tensor factored_norm(const Tensor &squares, const Tensor &weight, const Tensor &a, const Tensor &b, double scaling) {
  const auto dtype = c10::promoteTypes(c10::promoteTypes(weight.scalar_type(), a.scalar_type()), at::kFloat);
  const bool served = weight.scalar_type() == at::kBFloat16 || weight.scalar_type() == at::kFloat;
  const bool fits = weight.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(1) == weight.size(1) &&
                    b.size(0) == weight.size(0) && a.size(0) == b.size(1) && squares.numel() == b.size(0);
  if (fits && served && dtype == at::kFloat && squares.scalar_type() == at::kDouble && squares.is_contiguous() &&
      (weight.stride(1) == 1 || weight.stride(0) == 1)) {
    const Tensor right = a.to(weight.scalar_type()).contiguous();
    const auto floats = b.options().dtype(at::kFloat);
    const Tensor products = at::empty_like(b, floats, at::MemoryFormat::Contiguous),
                 among = b.new_empty({right.size(0), right.size(0)}, floats);
    const auto narrow = [&](const Tensor &big, const Tensor &result) {
      Job job = {NARROW,      big.data_ptr(),    big.stride(0),    big.size(0),
                 big.size(1), result.data_ptr(), result.stride(0), {adapter(right, 0)}};
      job.s_is_float = true;
      return job;
    };
    std::vector<Job> jobs = {narrow(right, among)};
    const Tensor turned = weight.stride(1) == 1 ? Tensor() : right.t().contiguous();
    jobs.push_back(turned.defined() ? make(OUTER, weight.t(), turned, {adapter(products, 1)})
                                    : narrow(weight, products));
    run(weight.scalar_type(), jobs);
    return add_terms(squares, products, among, b, scaling);
  }
  const bool half = weight.element_size() == 2;
  const Tensor right = (half ? a.to(weight.scalar_type()) : a).to(dtype), left = b.mul(scaling).to(dtype);
  const auto product = [&]() -> Tensor {
    if (weight.scalar_type() == dtype) return at::matmul(weight, right.mT());
    std::vector<Tensor> parts;  // few enough elements to stay in the caches
    for (const Tensor &part : weight.chunk(std::max<int64_t>(1, weight.numel() >> 19), -2))
      parts.push_back(at::matmul(part.to(dtype), right.mT()));
    return at::cat(parts, -2);
  };
  const Tensor terms = product().mul_(2).add_(at::matmul(left, at::matmul(right, right.mT())));
  return squares.add(terms.mul_(left).sum(-1)).clamp_min_(0).sqrt_().to(dtype);
}

Tensor gain_gradient(const Tensor &dot, const Tensor &total, at::TensorList dlefts, at::TensorList lefts,
                     const Maybe &bias, const Tensor &gain, const Tensor &dy, const Tensor &x, at::TensorList tensors,
                     c10::string_view format, at::IntArrayRef layout, at::ScalarType dtype) {
  const Weight weight = format.empty() ? Weight(tensors[0]) : Weight(tensors, format, layout, dtype);
  Tensor rest = dot;
  for (size_t j = 0; j < lefts.size(); ++j) rest = rest.sub(dlefts[j].to(dot.scalar_type()).mul(lefts[j]).sum(1));
  return grad_gain(rest, total, bias, gain, dy, x, weight);
}

// The operators of lorafx/bases/ops.py.
Tensor packed_rows(at::TensorList tensors, c10::string_view format, at::IntArrayRef layout, at::ScalarType dtype,
                   int64_t start, int64_t stop) {
  return Weight(tensors, format, layout, dtype).rows(start, stop);
}
Tensor packed_linear(const Tensor &x, const Maybe &bias, at::TensorList tensors, c10::string_view format,
                     at::IntArrayRef layout, at::ScalarType dtype) {
  return Weight(tensors, format, layout, dtype).linear(x, bias);
}
Tensor packed_mm(const Tensor &x, at::TensorList tensors, c10::string_view format, at::IntArrayRef layout,
                 at::ScalarType dtype) {
  Tensor y;
  Weight(tensors, format, layout, dtype).add_mm(y, x);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(lorafx, CompositeImplicitAutograd, m) { m.impl("cpu_linear", linear); }

TORCH_LIBRARY_IMPL(lorafx, CPU, m) {
  m.impl("cpu_group", forward);
  m.impl("cpu_group_backward", backward);
  m.impl("factored_norm", factored_norm);
  m.impl("gain_gradient", gain_gradient);
  m.impl("packed_rows", packed_rows);
  m.impl("packed_linear", packed_linear);
  m.impl("packed_mm", packed_mm);
  m.impl("round_into", round_into);
}
