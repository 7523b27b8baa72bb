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
// A square of LANES vectors, transposed.
inline void turn(vec (&v)[LANES]) {
#if defined(__AVX512F__)
  const auto halves = [&](int64_t by, __m512i low, __m512i high) {
    UNROLL
    for (int64_t i = 0; i < LANES; ++i)
      if (!(i & by)) {
        const __m512 a = __m512(v[i]), b = __m512(v[i + by]);
        v[i] = vec(_mm512_permutex2var_ps(a, low, b));
        v[i + by] = vec(_mm512_permutex2var_ps(a, high, b));
      }
  };
  halves(1, _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
         _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
  halves(2, _mm512_setr_epi32(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
         _mm512_setr_epi32(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  halves(4, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
         _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  halves(8, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         _mm512_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
#else
  for (int64_t i = 0; i < LANES; ++i)
    for (int64_t j = 0; j < i; ++j) {
      const float other = v[i][j];
      v[i][j] = v[j][i], v[j][i] = other;
    }
#endif
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
