// Vectors of floats as wide as the processor's own, and bfloat16.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Register tiles are arrays; only loops that are unrolled leave them in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// Wider ones than the processor has would be taken apart in memory, at a thirtieth of the speed.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, REGISTERS = 32;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif
constexpr int64_t WORD = 16;  // elements that share a word of a mask

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
// A vector that several products share, in a register: compilers like to read it again for each.
inline vec shared(const void *p) {
  vec v = bytes<vec>(p);
#if defined(__AVX__)
  __asm__("" : "+v"(v));
#endif
  return v;
}
// A difference, since v - 0 is v of any sign: the sum with 0 would be computed.
inline vec all(float v) { return v - vec{}; }
inline vec load(const float *p) { return bytes<vec>(p); }
inline vec load(const bf16 *p) { return vec(__builtin_convertvector(bytes<hvec>(p), uvec) << 16); }
inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16 *p, vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(__m512(v));
#else
  const uvec bits = uvec(v), nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const hvec h = __builtin_convertvector(v != v ? (bits >> 16) | 0x40u : nearest, hvec);  // as above
#endif
  std::memcpy(p, &h, sizeof h);
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
// Lanes of two vectors, those of the second counted on from LANES.
inline vec pick(vec a, vec b, uvec from) {
#if defined(__clang__)
  vec v;
  for (int64_t l = 0; l < LANES; ++l) v[l] = int64_t(from[l]) < LANES ? a[from[l]] : b[int64_t(from[l]) - LANES];
  return v;
#else
  return __builtin_shuffle(a, b, from);
#endif
}
// A square of LANES vectors, transposed: blocks of 1, then of 2, 4 and so on change places across the diagonal.
template <int64_t BY = 1> inline void turn(vec (&v)[LANES]) {
  uvec low, high;
  UNROLL
  for (int64_t l = 0; l < LANES; ++l) {
    low[l] = uint32_t(l & BY ? LANES + l - BY : l);
    high[l] = uint32_t(l & BY ? LANES + l : l + BY);
  }
  UNROLL
  for (int64_t i = 0; i < LANES; ++i)
    if (!(i & BY)) {
      const vec a = v[i], b = v[i + BY];
      v[i] = pick(a, b, low), v[i + BY] = pick(a, b, high);
    }
  if constexpr (2 * BY < LANES) turn<2 * BY>(v);
}
// The numbers of the lanes.
inline uvec lanes() {
  uvec v;
  UNROLL
  for (int64_t l = 0; l < LANES; ++l) v[l] = uint32_t(l);
  return v;
}
// A bit a lane of those from j on, of a row's words.
inline uint16_t mask_of(const uint16_t *bits, int64_t j) { return uint16_t(bits[j / WORD] >> j % WORD); }
inline vec keep(vec v, uint16_t mask) {
#if defined(__AVX512F__)
  return vec(_mm512_maskz_mov_ps(mask, __m512(v)));
#else
  return ((uvec{} + mask) >> lanes() & 1u) != 0 ? v : vec{};
#endif
}

}  // namespace
