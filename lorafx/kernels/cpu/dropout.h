// Which elements dropout keeps: one bit an element, from a counter.
#pragma once

#include <algorithm>

#include "vector.h"

namespace {

// Philox-4x32 (Salmon et al. 2011) for some counters at once, with the 7 rounds that its authors found to pass
// BigCrush.
struct Philox {
  uvec word[4];
  static void product(uvec a, uint32_t m, uvec &high, uvec &low) {
#if defined(__AVX512F__)
    const __m512i x = __m512i(a), f = _mm512_set1_epi32(int(m));
    const __m512i even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
    low = uvec(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
    high = uvec(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
    const __m256i x = __m256i(a), f = _mm256_set1_epi32(int(m));
    const __m256i even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
    low = uvec(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
    high = uvec(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
    for (int64_t l = 0; l < LANES; ++l) {
      const uint64_t p = uint64_t(a[l]) * m;
      high[l] = uint32_t(p >> 32);
      low[l] = uint32_t(p);
    }
#endif
  }
  Philox(uvec c0, uint32_t c1, uint32_t c2, uint64_t seed) {
    uvec c[4] = {c0, uvec{} + c1, uvec{} + c2, uvec{}};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      uvec h0, l0, h1, l1;
      product(c[0], 0xD2511F53u, h0, l0);
      product(c[2], 0xCD9E8D57u, h1, l1);
      c[0] = h1 ^ c[1] ^ k0;
      c[1] = l1;
      c[2] = h0 ^ c[3] ^ k1;
      c[3] = l0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    std::copy(c, c + 4, word);
  }
};

// A bit a lane; what is compared is below 2^16.
inline uint16_t at_least(uvec v, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(__m512i(v), _mm512_set1_epi32(int(threshold)));
#elif defined(__AVX2__)
  return uint16_t(_mm256_movemask_ps(__m256(_mm256_cmpgt_epi32(__m256i(v), _mm256_set1_epi32(int(threshold) - 1)))));
#else
  uint16_t bits = 0;
  for (int64_t l = 0; l < LANES; ++l) bits |= uint16_t(v[l] >= threshold) << l;
  return bits;
#endif
}

// A row's bits, set where an element is kept: 16 random bits each, so that p is exact to 2^-16. A counter's four words
// are those of an element of each of 8 words of the mask.
inline void draw_row(uint16_t *bits, int64_t chunks, int64_t row, int64_t adapter, uint64_t seed, float p) {
  const uint32_t threshold = uint32_t(p * 65536.0f + 0.5f);
  for (int64_t i = 0; i < chunks; i += 8) {
    const int64_t count = std::min<int64_t>(8, chunks - i);
    std::fill_n(bits + i, count, uint16_t(0));
    for (int64_t l = 0; l < WORD; l += LANES) {
      const Philox random(lanes() + uint32_t(i / 8 * WORD + l), uint32_t(row), uint32_t(adapter), seed);
      for (int64_t j = 0; j < count; ++j) {
        const uvec word = random.word[j / 2];
        bits[i + j] |= uint16_t(at_least(j % 2 ? word >> 16 : word & 0xffffu, threshold) << l);
      }
    }
  }
}

}  // namespace
