// Weights that are stored in few bits, read a tile at a time: the same numbers, to the bit, as lorafx/bases has in
// Python. A value is a code's number times its scale in float32, rounded once.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "vector.h"

namespace {

// Values of a float32 each, in whatever they are rounded to.
inline uvec rounded(vec v) {
  const uvec bits = uvec(v);  // finite, so that rounding is one addition
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
// Two vectors of values, those at even places and those at odd ones.
inline void store_alternating(bf16 *out, vec even, vec odd) {
  const uvec both = rounded(even) | rounded(odd) << 16;
  std::memcpy(out, &both, sizeof both);
}
inline void store_alternating(float *out, vec even, vec odd) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(out, vec(_mm512_permutex2var_ps(__m512(even), low, __m512(odd))));
  store(out + LANES,
        vec(_mm512_permutex2var_ps(__m512(even), _mm512_add_epi32(low, _mm512_set1_epi32(8)), __m512(odd))));
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps(__m256(even), __m256(odd)),
               high = _mm256_unpackhi_ps(__m256(even), __m256(odd));
  store(out, vec(_mm256_permute2f128_ps(low, high, 0x20)));
  store(out + LANES, vec(_mm256_permute2f128_ps(low, high, 0x31)));
#else
  for (int64_t l = 0; l < LANES; ++l) out[2 * l] = even[l], out[2 * l + 1] = odd[l];
#endif
}

// lorafx/bases/nf4.py: codes of 4 bits, the first of a byte in its high ones, and a scale for each block of values.
struct Nf4 {
  const uint8_t *codes;
  int64_t block;
  const float *absmax;  // of each block; or with 8 bits each the others
  const uint8_t *nested;
  const float *nested_absmax;
  float offset;

  static constexpr int64_t NESTED = 256;
  alignas(64) static constexpr float TABLE[16] = {-1.0f,
                                                  -0.6961928009986877f,
                                                  -0.5250730514526367f,
                                                  -0.39491748809814453f,
                                                  -0.28444138169288635f,
                                                  -0.18477343022823334f,
                                                  -0.09105003625154495f,
                                                  0.0f,
                                                  0.07958029955625534f,
                                                  0.16093020141124725f,
                                                  0.24611230194568634f,
                                                  0.33791524171829224f,
                                                  0.44070982933044434f,
                                                  0.5626170039176941f,
                                                  0.7229568362236023f,
                                                  1.0f};

  static const std::array<float, 256> &nested_table() {
    static const std::array<float, 256> table = [] {
      std::array<float, 256> found = {0.0f, 1.0f};
      const float low = 0.1f, high = 1.0f;
      size_t at = 2;
      for (int decade = 0; decade < 7; ++decade) {
        const int count = 1 << decade;
        const double step = (high - low) / float(count);
        const auto edge = [&](int i) {
          return i < (count + 1) / 2 ? float(double(low) + step * i) : float(double(high) - step * (count - i));
        };
        for (int i = 0; i < count; ++i) {
          const float middle = (edge(i) + edge(i + 1)) / 2 * float(std::pow(10.0, decade - 6));
          found[at++] = middle, found[at++] = -middle;
        }
      }
      std::sort(found.begin(), found.end());
      return found;
    }();
    return table;
  }

  // Volatile, since a fused multiply-add would round once instead of twice.
  float scale(int64_t i) const {
    if (!nested) return absmax[i];
    const volatile float product = nested_table()[nested[i]] * nested_absmax[i / NESTED];
    return product + offset;
  }

  // LANES bytes, and the table's values at the lowest 4 bits of each.
#if defined(__AVX512F__)
  static uvec bytes_of(const uint8_t *p) { return uvec(_mm512_cvtepu8_epi32(bytes<__m128i>(p))); }
  static vec look_up(uvec at) { return vec(_mm512_permutexvar_ps(__m512i(at), _mm512_load_ps(TABLE))); }
#elif defined(__AVX2__)
  static uvec bytes_of(const uint8_t *p) { return uvec(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes<int64_t>(p)))); }
  static vec look_up(uvec at) {  // by the lowest 3 bits, and the highest of those 4
    const __m256i i = __m256i(at);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(TABLE), i);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(TABLE + 8), i);
    return vec(_mm256_blendv_ps(low, high, __m256(_mm256_slli_epi32(i, 28))));
  }
#endif

  // Values [from, to) of all of them, row after row.
  template <typename T> void read(int64_t from, int64_t to, T *out) const {
    const auto one = [&](int64_t i, float by) {
      round_to(*out++, TABLE[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * by);
    };
    while (from < to) {
      const int64_t end = std::min(to, (from / block + 1) * block);
      const float by = scale(from / block);
      if (from % 2) one(from++, by);
#if defined(__AVX2__)
      for (; from + 2 * LANES <= end; from += 2 * LANES, out += 2 * LANES) {
        const uvec pair = bytes_of(codes + from / 2);
        store_alternating(out, look_up(pair >> 4) * by, look_up(pair) * by);
      }
#endif
      while (from < end) one(from++, by);
    }
  }
};

// lorafx/bases/int8.py: codes of 8 bits, and a scale for each row.
struct Int8 {
  const int8_t *codes;
  const float *absmax;
  int64_t width;

  template <typename T> void read(int64_t from, int64_t to, T *out) const {
    while (from < to) {
      const int64_t end = std::min(to, (from / width + 1) * width);
      const float by = absmax[from / width] / 127.0f;
      for (; from < end; ++from) round_to(*out++, float(codes[from]) * by);
    }
  }
};

// Rows [top, bottom) and columns [left, right) of a matrix, one row after the other.
template <typename T, typename Format>
void read_tile(const Format &matrix, int64_t width, int64_t top, int64_t bottom, int64_t left, int64_t right, T *out,
               int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && (bottom - top) * (right - left) > 1 << 14)
  for (int64_t i = top; i < bottom; ++i)
    matrix.read(i * width + left, i * width + right, out + (i - top) * (right - left));
}

}  // namespace
