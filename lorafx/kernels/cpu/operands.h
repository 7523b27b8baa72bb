// Tensors as jobs take them.
#pragma once

#include <optional>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>

#include "jobs.h"
#include "weight.h"

namespace {

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

int64_t ranks(const std::vector<Adapter> &adapters) {
  int64_t sum = 0;
  for (const Adapter &one : adapters) sum += one.r;
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

// Adapters that meet x with the same factor and drop nothing have one product with it: of each the first like it.
struct Alike {
  std::vector<size_t> first;
  bool any = false;

  Alike(at::TensorList rights, at::ArrayRef<double> p, at::ArrayRef<double> scales) {
    for (size_t j = 0; j < rights.size(); ++j) {
      const auto same = [&](size_t i) {
        const Tensor &a = rights[i], &b = rights[j];
        return p[i] == 0.0 && p[j] == 0.0 && scales[i] == scales[j] && a.data_ptr() == b.data_ptr() &&
               a.sizes() == b.sizes() && a.strides() == b.strides() && a.scalar_type() == b.scalar_type();
      };
      size_t i = 0;
      while (i < j && !same(i)) ++i;
      any |= i < j;
      first.push_back(i);
    }
  }
  // The first ones' alone.
  std::vector<Adapter> select(std::vector<Adapter> adapters) const {
    std::vector<Adapter> found;
    for (size_t j = 0; j < first.size(); ++j)
      if (first[j] == j) found.push_back(adapters[j]);
    return found;
  }
  // Columns of the first ones alone, for each.
  Tensor spread(const Tensor &s, at::TensorList rights) const {
    std::vector<Tensor> parts;
    int64_t column = 0;
    for (size_t j = 0; j < first.size(); ++j) {
      const int64_t r = rights[j].size(0);
      parts.push_back(first[j] == j ? s.narrow(1, column, r) : parts[first[j]]);
      if (first[j] == j) column += r;
    }
    return at::cat(parts, 1);
  }
  // Columns of each, summed up to those of the first ones.
  Tensor sum(const Tensor &ds, at::TensorList rights) const {
    std::vector<Tensor> parts(first.size()), found;
    int64_t column = 0;
    for (size_t j = 0; j < first.size(); ++j) {
      const Tensor part = ds.narrow(1, column, rights[j].size(0));
      Tensor &sum = parts[first[j]];
      sum = sum.defined() ? sum.add(part) : part;
      column += part.size(1);
    }
    for (const Tensor &part : parts)
      if (part.defined()) found.push_back(part);
    return at::cat(found, 1);
  }
};

Job make(Kind kind, const Tensor &big, const Tensor &s, std::vector<Adapter> adapters) {
  const int64_t r = ranks(adapters);
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

}  // namespace
