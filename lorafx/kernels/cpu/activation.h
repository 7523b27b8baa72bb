// An activation computed again and differentiated.
#pragma once

#include <cmath>

#include "vector.h"

namespace {

// exp to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 below -87, inf above 88.
inline vec exponential(vec x) {
  const vec above = x < -87.0f ? all(-87.0f) : x, clamped = above > 88.0f ? all(88.0f) : above;
  const vec shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds: the low bits of the sum are n
  const vec n = shifted - 12582912.0f;
  const vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  p *= vec((uvec(shifted) + (127u - 0x4b400000u)) << 23);
  const vec small = x < -87.0f ? all(0.0f) : p;
  return x > 88.0f ? all(INFINITY) : small;
}

// f(h) and f'(h).
struct Pair {
  vec value, slope;
};
struct Silu {
  static Pair at(vec h) {
    const vec s = 1.0f / (1.0f + exponential(-h));
    return {h * s, s * (1.0f + h * (1.0f - s))};
  }
};
struct GeluTanh {
  static Pair at(vec h) {
    constexpr float c = 0.79788456080286536f, k = 0.044715f;
    const vec t = 1.0f - 2.0f / (1.0f + exponential(2.0f * c * h * (1.0f + k * h * h)));
    return {0.5f * h * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * h * (1.0f - t * t) * c * (1.0f + 3.0f * k * h * h)};
  }
};
struct Gelu {
  // erfc(z) by a polynomial in t times exp(-z^2), off by 1.5e-7 at most (Abramowitz and Stegun, 7.1.26).
  static Pair at(vec h) {
    const vec bell = exponential(-0.5f * h * h), z = (h < 0.0f ? -h : h) * 0.70710678118654752f;
    const vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec tail = 0.5f * t * p * bell;
    const vec below = h < 0.0f ? tail : 1.0f - tail;
    return {h * below, below + h * 0.39894228040143268f * bell};
  }
};

// x = f(h) u again, and the gradients from dx, which dh is written over; without u it is 1.
template <typename F, typename T> void activate(const T *h, const T *u, T *dx, T *x, T *du, int64_t n) {
  for (int64_t at = 0; at < n; at += LANES) {
    const int64_t rest = n - at;
    const Pair f = F::at(load(h + at, rest));
    const vec d = load(dx + at, rest);
    if (u) {
      const vec factor = load(u + at, rest);
      store(x + at, f.value * factor, rest);
      store(dx + at, d * factor * f.slope, rest);
      store(du + at, d * f.value, rest);
    } else {
      store(x + at, f.value, rest);
      store(dx + at, d * f.slope, rest);
    }
  }
}

enum Activation { GELU, GELU_TANH, SILU };
template <typename T> using Activate = void (*)(const T *, const T *, T *, T *, T *, int64_t);
template <typename T> constexpr Activate<T> ACTIVATE[] = {activate<Gelu, T>, activate<GeluTanh, T>, activate<Silu, T>};

}  // namespace
