// Exact values rounded to a weight's dtype, once, and what that did (kernels/rounding.py): one pass over a tile.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "vector.h"

namespace {

using at::Tensor;

// LANES numbers at a time (vector.h); of floats, and of doubles.
template <typename T> struct Vector {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <typename T> using Many = typename Vector<T>::type;

template <typename Wide, typename T> inline Many<Wide> widened(const T *p) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return __builtin_convertvector(load(reinterpret_cast<const bf16 *>(p)), Many<Wide>);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    vec v;
#if defined(__AVX512F__)
    v = vec(_mm512_cvtph_ps(bytes<__m256i>(p)));
#elif defined(__F16C__)
    v = vec(_mm256_cvtph_ps(bytes<__m128i>(p)));
#else
    for (int64_t l = 0; l < LANES; ++l) v[l] = static_cast<float>(p[l]);
#endif
    return __builtin_convertvector(v, Many<Wide>);
  } else {
    return __builtin_convertvector(bytes<Many<T>>(p), Many<Wide>);
  }
}

// To the nearest, ties to even. What vector.h has for bfloat16 makes numbers below the least normal one zero.
inline void round_to(c10::BFloat16 *p, vec v) {
  const uvec bits = uvec(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const hvec h = __builtin_convertvector(v != v ? uvec{} + 0x7fc0u : rounded, hvec);
  std::memcpy(p, &h, sizeof h);
}
inline void round_to(c10::Half *p, vec v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
#else
  for (int64_t l = 0; l < LANES; ++l) p[l] = static_cast<c10::Half>(v[l]);
#endif
}
template <typename Out, typename V> inline std::enable_if_t<std::is_floating_point_v<Out>> round_to(Out *p, V v) {
  const auto converted = __builtin_convertvector(v, Many<Out>);
  std::memcpy(p, &converted, sizeof converted);
}
// From double by float, which is rounded to odd: that keeps on which side of a tie the number was.
template <typename Out> inline std::enable_if_t<sizeof(Out) == 2> round_to(Out *p, Many<double> v) {
  vec odd;
  for (int64_t l = 0; l < LANES; ++l) {
    float near = static_cast<float>(v[l]);
    const double gap = v[l] - double(near);
    if (gap != 0 && std::isfinite(near)) {
      uint32_t bits;
      std::memcpy(&bits, &near, sizeof bits);
      bits = (bits - uint32_t((gap < 0) != (near < 0) && near != 0)) | 1u;
      std::memcpy(&near, &bits, sizeof bits);
    }
    odd[l] = near;
  }
  round_to(p, odd);
}

// What kernels/rounding.py's Rounding has.
struct Sums {
  double largest = 0, error = 0, change = 0, along = 0;
};

// The same of some rows, lane by lane.
template <typename Wide> struct Lanes {
  Many<Wide> largest = {}, error = {}, change = {}, along = {};

  void add_to(Sums &sums) const {
    for (int64_t l = 0; l < LANES; ++l) {
      sums.largest = largest[l] > sums.largest ? double(largest[l]) : sums.largest;
      sums.error += error[l], sums.change += change[l], sums.along += along[l];
    }
  }
};

template <bool ADDED, typename Out, typename Wide, typename Base>
inline void round_many(Out *out, const Wide *values, const Base *base, Lanes<Wide> &lanes) {
  const Many<Wide> b = widened<Wide>(base), given = bytes<Many<Wide>>(values), v = ADDED ? b + given : given, d = v - b;
  round_to(out, v);
  const Many<Wide> e = widened<Wide>(out) - v, size = e < 0 ? -e : e;
  lanes.largest = size > lanes.largest ? size : lanes.largest;
  lanes.error += e * e, lanes.change += d * d, lanes.along += e * d;
}

// A row: out[j] = values[j], or base[j] + values[j], rounded.
template <bool ADDED, typename Out, typename Wide, typename Base>
inline void round_row(Out *out, const Wide *values, const Base *base, int64_t count, Lanes<Wide> &lanes) {
  Lanes<Wide> mine = lanes;  // in registers
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) round_many<ADDED>(out + j, values + j, base + j, mine);
  if (j < count) {
    Out rest[LANES];
    Wide from[LANES] = {};
    Base was[LANES] = {};
    std::copy(values + j, values + count, from);
    std::copy(base + j, base + count, was);
    round_many<ADDED>(rest, from, was, mine);
    std::copy(rest, rest + (count - j), out + j);
  }
  lanes = mine;
}

// Rows of a matrix, written as its columns: by squares, so that whole cache lines are written.
template <bool ADDED, typename Out, typename Wide, typename Base>
void round_turned(Out *out, int64_t stride, const Wide *values, int64_t values_stride, const Base *base,
                  int64_t base_stride, int64_t height, int64_t width, Sums &sums) {
  constexpr int64_t SIDE = 64;
  Out rows[SIDE][SIDE] = {}, column[SIDE];
  for (int64_t i = 0; i < height; i += SIDE)
    for (int64_t j = 0; j < width; j += SIDE) {
      const int64_t h = std::min(SIDE, height - i), w = std::min(SIDE, width - j);
      Lanes<Wide> lanes;
      for (int64_t r = 0; r < h; ++r)
        round_row<ADDED>(rows[r], values + (i + r) * values_stride + j, base + (i + r) * base_stride + j, w, lanes);
      lanes.add_to(sums);
      for (int64_t c = 0; c < w; ++c) {
        for (int64_t r = 0; r < SIDE; ++r) column[r] = rows[r][c];
        std::memcpy(out + (j + c) * stride + i, column, h * sizeof(Out));
      }
    }
}

template <typename F> void with_type(at::ScalarType dtype, F &&f) {
  switch (dtype) {
  case at::kFloat:
    return f(float{});
  case at::kDouble:
    return f(double{});
  case at::kHalf:
    return f(c10::Half{});
  case at::kBFloat16:
    return f(c10::BFloat16{});
  default:
    TORCH_CHECK(false, "lorafx::round_into: ", dtype, " is no dtype of weights");
  }
}

Tensor round_into(const Tensor &target, const Tensor &given, const Tensor &weight, bool added) {
  TORCH_CHECK(target.dim() == 2 && target.sizes() == given.sizes() && target.sizes() == weight.sizes(),
              "lorafx::round_into takes matrices of one shape");
  const bool by_columns = given.stride(0) == 1 && given.stride(1) != 1;  // as a weight that is stored transposed
  Tensor out = by_columns ? target.t() : target;
  const Tensor values = (by_columns ? given.t() : given).contiguous();
  Tensor base = by_columns ? weight.t() : weight;
  if (base.stride(1) != 1) base = base.contiguous();
  const int64_t height = out.size(0), width = out.size(1);
  const bool turned = out.stride(1) != 1 && out.stride(0) == 1;
  TORCH_CHECK(turned || out.stride(1) == 1 || width == 1, "lorafx::round_into: out has gaps in both directions");
  Sums sums;
  with_type(out.scalar_type(), [&](auto o) {
    with_type(values.scalar_type(), [&](auto x) {
      with_type(base.scalar_type(), [&](auto b) {
        using Out = decltype(o);
        using Wide = decltype(x);
        using Base = decltype(b);
        if constexpr (std::is_same_v<Wide, float> || std::is_same_v<Wide, double>) {
          Out *to = out.mutable_data_ptr<Out>();
          const Wide *from = values.const_data_ptr<Wide>();
          const Base *was = base.const_data_ptr<Base>();
          const auto go = [&](auto add) {
            if (turned)
              return round_turned<add>(to, out.stride(1), from, width, was, base.stride(0), height, width, sums);
            for (int64_t i = 0; i < height; ++i) {
              Lanes<Wide> lanes;
              round_row<add>(to + i * out.stride(0), from + i * width, was + i * base.stride(0), width, lanes);
              lanes.add_to(sums);
            }
          };
          added ? go(std::true_type()) : go(std::false_type());
        } else {
          TORCH_CHECK(false, "lorafx::round_into: values are float32 or float64");
        }
      });
    });
  });
  // Comparisons pass over NaN, sums do not.
  const double largest = std::isnan(sums.error) ? sums.error : sums.largest;
  const Tensor found = at::empty({4}, values.options().dtype(at::kDouble));
  double *f = found.mutable_data_ptr<double>();
  f[0] = largest, f[1] = sums.error, f[2] = sums.change, f[3] = sums.along;
  return found;
}

}  // namespace
