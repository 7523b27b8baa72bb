// What gains do to factors [n, r] and their gradients, each in one pass; and the gains' own gradient.
#pragma once

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>

#include "operands.h"
#include "weight.h"

namespace {

// f of a factor's memory: float32 or bfloat16, which is all that smalls() leaves.
template <typename F> void read(const Tensor &t, const F &f) {
  t.scalar_type() == at::kFloat ? f(t.const_data_ptr<float>()) : f(static_cast<const bf16 *>(t.const_data_ptr()));
}

// gain * left, in float32; gain is float32.
Tensor scale_rows(const Tensor &left, const Tensor &gain) {
  const Tensor given = left.contiguous();
  const Tensor found = at::empty_like(given, given.options().dtype(at::kFloat));
  const int64_t r = left.size(1);
  float *const out = found.data_ptr<float>();
  const float *const factors = gain.const_data_ptr<float>();
  read(given, [&](const auto *values) {
    at::parallel_for(0, left.size(0), 256, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        for (int64_t j = 0; j < r; j += LANES)
          store(out + i * r + j, load(values + i * r + j, r - j) * factors[i], r - j);
    });
  });
  return found;
}

// The gradient of a factor, from that of gain * left; and, where a gain asks, of each row the sum of the latter times
// the factor.
struct LeftGradient {
  Tensor grad, dot;
};

LeftGradient left_gradient(const Tensor &dl, const Tensor &left, const Maybe &gain, bool needs_dot) {
  if (!gain) return {dl, needs_dot ? dl.to(at::kFloat).mul(left).sum(1) : Tensor()};
  const Tensor given = left.contiguous();
  const Tensor grad = at::empty_like(given), dot = gain->new_empty({left.size(0)});
  const int64_t r = left.size(1);
  const float *const factors = gain->const_data_ptr<float>(), *const d = dl.const_data_ptr<float>();
  float *const sums = dot.data_ptr<float>();
  read(given, [&](const auto *values) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    T *const out = static_cast<T *>(grad.data_ptr());
    at::parallel_for(0, left.size(0), 256, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        vec sum = {};
        for (int64_t j = 0; j < r; j += LANES) {
          const vec part = load(d + i * r + j, r - j);
          sum += part * load(values + i * r + j, r - j);
          store(out + i * r + j, part * factors[i], r - j);
        }
        float whole = 0.0f;
        for (int64_t lane = 0; lane < LANES; ++lane) whole += sum[lane];
        sums[i] = whole;
      }
    });
  });
  return {grad, dot};
}

// The rest of lorafx/kernels/gain.py's formula: dot is without the low-rank part.
Tensor grad_gain(const Tensor &dot, const Tensor &total, const Maybe &bias, const Tensor &gain, const Tensor &dy,
                 const Tensor &x, const Weight &weight) {
  const Tensor small = gain.abs().lt(dy.element_size() == 2 ? 1.0 / 2 : 1.0 / 16);  // as in gain.py
  Tensor found = (bias ? dot.sub(bias->mul(total)) : dot).div(gain.masked_fill(small, 1.0));
  if (small.any().item<bool>()) {
    const Tensor at = small.nonzero().flatten();
    const int64_t step = std::max<int64_t>(1, TILE_BYTES / (weight.in() * x.element_size()));
    for (int64_t from = 0; from < at.numel(); from += step) {
      const Tensor part = at.slice(0, from, from + step);
      const Tensor y = at::linear(x, weight.select(part));
      found.index_copy_(0, part, dy.index_select(1, part).mul(y).sum(0, false, found.scalar_type()));
    }
  }
  return found.to(gain.scalar_type());
}

}  // namespace
