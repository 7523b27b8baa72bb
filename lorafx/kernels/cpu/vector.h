// Vectors of 16 floats, and bfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Register tiles are arrays; only loops that are unrolled leave them in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int64_t LANES = 16;

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t uvec __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t hvec __attribute__((vector_size(LANES * sizeof(uint16_t))));
struct bf16 {
  uint16_t bits;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline float widen(float v) { return v; }
inline float widen(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline void round_to(float &out, float v) { out = v; }
inline void round_to(bf16 &out, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    out.bits = uint16_t((bits >> 16) | 0x40u);  // NaN stays NaN
  else
    out.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest even
}

// Through memcpy, which lets the compiler keep what is not the memory's own in registers.
template <typename V> inline V bytes(const void *p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const float *p) { return bytes<vec>(p); }
inline vec load(const bf16 *p) { return vec(__builtin_convertvector(bytes<hvec>(p), uvec) << 16); }
inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16 *p, vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(__m512(v));
  std::memcpy(p, &h, sizeof h);
#else
  for (int64_t l = 0; l < LANES; ++l) round_to(p[l], v[l]);
#endif
}
// Two vectors.
inline void load_two(const float *p, vec &a, vec &b) { a = load(p), b = load(p + LANES); }
inline void load_two(const bf16 *p, vec &a, vec &b) { a = load(p), b = load(p + LANES); }
inline void store_two(float *p, vec a, vec b) { store(p, a), store(p + LANES, b); }
inline void store_two(bf16 *p, vec a, vec b) {
#if defined(__AVX512BF16__)
  const __m512bh h = _mm512_cvtne2ps_pbh(__m512(b), __m512(a));
  std::memcpy(p, &h, sizeof h);
#else
  store(p, a), store(p + LANES, b);
#endif
}
// The first n of a vector.
template <typename T> inline vec load(const T *p, int64_t n) {
  if (n >= LANES) return load(p);
  vec v = {};
  for (int64_t l = 0; l < n; ++l) v[l] = widen(p[l]);
  return v;
}
template <typename T> inline void store(T *p, vec v, int64_t n) {
  if (n >= LANES) return store(p, v);
  for (int64_t l = 0; l < n; ++l) round_to(p[l], v[l]);
}
inline vec keep(vec v, uint16_t mask) {
#if defined(__AVX512F__)
  return vec(_mm512_maskz_mov_ps(mask, __m512(v)));
#else
  for (int64_t l = 0; l < LANES; ++l) v[l] = (mask >> l) & 1 ? v[l] : 0.0f;
  return v;
#endif
}

}  // namespace
