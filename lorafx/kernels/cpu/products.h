// Three products with one narrow side, on a block of rows or columns, accumulated in float32.
//
//   narrow   s = kept x packed                 [rows, K] -> [rows, r]
//   expand   y += scale * kept (s packed)      [rows, r] -> [rows, N]
//   outer    g += s^T kept x                   [rows, r], [rows, columns] -> [r, columns]
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace {

// A register tile is rows of vectors, and beside it there are a row's vectors and an operand of a column.
constexpr bool MANY = REGISTERS >= 32;
constexpr int64_t ROWS = MANY ? 8 : 6;                 // rows of a register tile
constexpr int64_t VECTORS = MANY ? 3 : 2;              // vectors of its rows, at most
constexpr int64_t RANKS = MANY && LANES >= 8 ? 8 : 4;  // rows of a register tile of an outer product
constexpr int64_t DEPTH = 256;  // columns of a tile's rows that are copied together: they stay in the first-level cache
constexpr int64_t WIDTH = 64;   // columns that an outer product works on together
constexpr int64_t SOME = 4;     // vectors of which three kinds are kept
constexpr int64_t STEPS = MANY ? 64 : 32;  // operands a column of them: a tile stays in the first-level cache

// What the inner loops multiply: one float, or two neighbouring bfloat16 in 32 bits.
template <typename T> struct Operand;
template <> struct Operand<float> {
  using type = float;
  static constexpr int64_t width = 1;
  static vec multiply(vec sum, vec left, vec right) { return sum + left * right; }
  static vec spread(const float *p) { return all(*p); }
};
#if defined(__AVX512BF16__)
template <> struct Operand<bf16> {
  using type = uint32_t;
  static constexpr int64_t width = 2;
  static vec multiply(vec sum, vec left, vec right) {
    return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(left), __m512bh(right)));
  }
  static vec spread(const uint32_t *p) { return vec(_mm512_set1_epi32(bytes<int>(p))); }
};
#else
template <> struct Operand<bf16> : Operand<float> {};
#endif
template <typename T> using OperandOf = typename Operand<T>::type;
// Whether a row in memory is a row of operands already.
template <typename T> constexpr bool IN_PLACE = sizeof(OperandOf<T>) == sizeof(T) * Operand<T>::width;

// 16 operands of one row, or of two.
inline void pair_up(float *out, vec a, vec) { store(out, a); }
#if defined(__AVX512BF16__)
inline void pair_up(bf16 *out, vec a, vec b) {
  const __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(a))));
  const __m512i high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(__m512(b))));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// A matrix of operands [depth / width, n]: neighbours along the depth are neighbours in memory.
template <typename T> struct Packed {
  using Element = std::conditional_t<IN_PLACE<T>, T, float>;
  static constexpr int64_t W = Operand<T>::width;
  Element *values;
  int64_t n;
  template <typename S> void put(int64_t i, int64_t j, S v) const {
    round_to(values[(i / W * n + j) * W + i % W], widen(v));
  }
  const OperandOf<T> *row(int64_t d) const { return reinterpret_cast<const OperandOf<T> *>(values) + d * n; }
  static int64_t bytes(int64_t depth, int64_t n) { return round_up(depth, W) * n * int64_t(sizeof(Element)); }

  // [depth, width] at (i, j), and zeros up to the next multiple of LANES columns; element (a, b) is at
  // source[a * along_depth + b * along_n].
  template <typename S>
  void fill(int64_t i, int64_t j, const S *source, int64_t along_depth, int64_t along_n, int64_t depth,
            int64_t width) const {
    if (i % W || depth % W || (along_depth != 1 && along_n != 1)) {
      for (int64_t a = 0; a < depth; ++a)
        for (int64_t b = 0; b < width; ++b) put(i + a, j + b, source[a * along_depth + b * along_n]);
      return;
    }
    if (along_n == 1) {
      for (int64_t a = 0; a < depth; a += W)
        for (int64_t b = 0; b < width; b += LANES) {
          const S *p = source + a * along_depth + b;
          if (j + b + LANES > n) {
            for (int64_t w = 0; w < W; ++w)
              for (int64_t k = 0; k < width - b; ++k) put(i + a + w, j + b + k, p[w * along_depth + k]);
            break;
          }
          pair_up(values + ((i + a) / W * n + j + b) * W, load(p, width - b),
                  load(p + (W - 1) * along_depth, width - b));
        }
      return;
    }
    for (int64_t b = 0; b < width; b += LANES)
      for (int64_t a = 0; a < depth; a += LANES) {
        const int64_t columns = std::min(LANES, width - b), rows = std::min(LANES, depth - a);
        vec square[LANES] = {};
        for (int64_t k = 0; k < columns; ++k) square[k] = load(source + a + (b + k) * along_n, rows);
        turn(square);
        Element *out = values + ((i + a) / W * n + j + b) * W;
        for (int64_t k = 0; k < rows; k += W, out += n * W) {
          if (columns == LANES)
            pair_up(out, square[k], square[k + W - 1]);
          else
            for (int64_t w = 0; w < W; ++w)
              for (int64_t l = 0; l < columns; ++l) round_to(out[l * W + w], square[k + w][l]);
        }
      }
  }
};

// ---- narrow -------------------------------------------------------------------------------------------------------

// sums[ROWS, WIDE * LANES] += x[ROWS, depth] packed
template <typename T, int WIDE, typename O>
inline void narrow_tile(const O *x, int64_t stride, const O *packed, int64_t n, int64_t depth, float *sums) {
  vec sum[ROWS][WIDE];
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m) {
    UNROLL
    for (int v = 0; v < WIDE; ++v) sum[m][v] = load(sums + m * n + v * LANES);
  }
  for (int64_t d = 0; d < depth; ++d) {
    vec right[WIDE];
    UNROLL
    for (int v = 0; v < WIDE; ++v) right[v] = shared(packed + d * n + v * LANES);
    UNROLL
    for (int64_t m = 0; m < ROWS; ++m) {
      const vec left = Operand<T>::spread(x + m * stride + d);
      UNROLL
      for (int v = 0; v < WIDE; ++v) sum[m][v] = Operand<T>::multiply(sum[m][v], left, right[v]);
    }
  }
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m) {
    UNROLL
    for (int v = 0; v < WIDE; ++v) store(sums + m * n + v * LANES, sum[m][v]);
  }
}

template <typename T, typename O>
inline void narrow_tiles(const O *x, int64_t stride, const O *packed, int64_t n, int64_t depth, float *sums) {
  int64_t j = 0;
  if constexpr (VECTORS > 2)
    for (; j + 3 * LANES <= n; j += 3 * LANES) narrow_tile<T, 3>(x, stride, packed + j, n, depth, sums + j);
  for (; j + 2 * LANES <= n; j += 2 * LANES) narrow_tile<T, 2>(x, stride, packed + j, n, depth, sums + j);
  for (; j < n; j += LANES) narrow_tile<T, 1>(x, stride, packed + j, n, depth, sums + j);
}

// Some of a row as operands, and zeros after its end.
inline void copy_row(float *out, const float *x, int64_t n, const uint16_t *bits) {
  for (int64_t j = 0; j < n; j += LANES) {
    const vec v = load(x + j, n - j);
    store(out + j, bits ? keep(v, mask_of(bits, j)) : v);
  }
}
inline void copy_row(float *out, const bf16 *x, int64_t n, const uint16_t *bits) {
  for (int64_t j = 0; j < n; j += LANES) {
    const vec v = load(x + j, n - j);
    store(out + j, bits ? keep(v, mask_of(bits, j)) : v);
  }
}
#if defined(__AVX512BF16__)
inline void copy_row(uint32_t *out, const bf16 *x, int64_t n, const uint16_t *bits) {
  for (int64_t j = 0; j < n; j += 2 * LANES, out += LANES) {
    const __mmask32 there = n - j >= 2 * LANES ? ~0u : (1u << (n - j)) - 1;
    const __mmask32 kept = !bits ? ~0u : bits[j / LANES] | (n - j > LANES ? uint32_t(bits[j / LANES + 1]) << 16 : 0);
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(there & kept, x + j));
  }
}
#endif

// sums[ROWS, n] = (kept x)[rows, K] packed
template <typename T>
void narrow_rows(const T *x, int64_t ldx, int64_t rows, int64_t K, const Packed<T> &packed, const uint16_t *bits,
                 int64_t chunks, float *sums) {
  using O = OperandOf<T>;
  constexpr int64_t W = Operand<T>::width;
  const int64_t n = packed.n;
  std::fill_n(sums, ROWS * n, 0.0f);
  int64_t k = 0;
  if constexpr (IN_PLACE<T>)
    if (rows == ROWS && !bits && ldx % W == 0) {
      const int64_t whole = K / W * W;
      for (; k < whole; k += DEPTH)
        narrow_tiles<T>(reinterpret_cast<const O *>(x + k), ldx / W, packed.row(k / W), n,
                        std::min(DEPTH, whole - k) / W, sums);
      k = whole;
    }
  constexpr int64_t stride = DEPTH / W;
  alignas(64) O tile[ROWS * stride];
  for (; k < K; k += DEPTH) {
    const int64_t depth = std::min(DEPTH, K - k);
    for (int64_t i = 0; i < ROWS; ++i)
      if (i < rows)
        copy_row(tile + i * stride, x + i * ldx + k, depth, bits ? bits + i * chunks + k / WORD : nullptr);
      else
        std::fill_n(tile + i * stride, stride, O(0));
    narrow_tiles<T>(tile, stride, packed.row(k / W), n, round_up(depth, W) / W, sums);
  }
}

// ---- expand -------------------------------------------------------------------------------------------------------

// sum[ROWS, WIDE * LANES] += s packed
template <typename T, int WIDE, typename O>
inline void expand_sums(vec (&sum)[ROWS][WIDE], const O *s, int64_t depth, const O *packed, int64_t ld) {
  for (int64_t d = 0; d < depth; ++d) {
    vec right[WIDE];
    UNROLL
    for (int v = 0; v < WIDE; ++v) right[v] = shared(packed + d * ld + v * LANES);
    UNROLL
    for (int64_t m = 0; m < ROWS; ++m) {
      const vec left = Operand<T>::spread(s + m * depth + d);
      UNROLL
      for (int v = 0; v < WIDE; ++v) sum[m][v] = Operand<T>::multiply(sum[m][v], left, right[v]);
    }
  }
}

// What is added to y beside s packed: (gain - 1) * (y - bias), and which elements of s packed are kept, times scale.
struct Rest {
  const float *gain, *bias;
  const float *start;    // what y is before, in each row; null: what is there
  const uint16_t *bits;  // of the first row
  int64_t chunks;        // words a row of them
  float scale;
};

// y[ROWS, 2 * LANES] += the rest and s packed: exactly y where gain is 1 and s packed 0
template <typename T, bool GAIN, bool BITS, typename O>
inline void expand_full(T *y, int64_t ldy, int64_t n, const O *s, int64_t depth, const O *packed, int64_t ld,
                        const Rest &rest) {
  vec sum[ROWS][2] = {};
  if constexpr (!GAIN && !BITS) {
    UNROLL
    for (int64_t m = 0; m < ROWS; ++m)
      rest.start ? load_two(rest.start + n, sum[m][0], sum[m][1]) : load_two(y + m * ldy + n, sum[m][0], sum[m][1]);
  }
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m) __builtin_prefetch(y + (m + ROWS) * ldy + n, 1);
  expand_sums<T, 2>(sum, s, depth, packed + n, ld);
  vec excess[2] = {}, shift[2] = {};
  if constexpr (GAIN) {
    load_two(rest.gain + n, excess[0], excess[1]);
    excess[0] -= 1.0f, excess[1] -= 1.0f;
    if (rest.bias) load_two(rest.bias + n, shift[0], shift[1]);
  }
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m) {
    if constexpr (GAIN || BITS) {
      vec value[2];
      rest.start ? load_two(rest.start + n, value[0], value[1]) : load_two(y + m * ldy + n, value[0], value[1]);
      UNROLL
      for (int v = 0; v < 2; ++v) {
        if constexpr (BITS)
          sum[m][v] = keep(sum[m][v], mask_of(rest.bits + m * rest.chunks, n + v * LANES)) * rest.scale;
        if constexpr (GAIN) value[v] += excess[v] * (value[v] - shift[v]);
        sum[m][v] += value[v];
      }
    }
    store_two(y + m * ldy + n, sum[m][0], sum[m][1]);
  }
}

// The same for some rows and a last few columns.
template <typename T, typename O>
inline void expand_any(T *y, int64_t ldy, int64_t rows, int64_t n, int64_t columns, const O *s, int64_t depth,
                       const O *packed, int64_t ld, const Rest &rest) {
  vec sum[ROWS][1] = {};
  expand_sums<T, 1>(sum, s, depth, packed + n, ld);
  const vec excess = rest.gain ? load(rest.gain + n, columns) - 1.0f : vec{};
  const vec shift = rest.bias ? load(rest.bias + n, columns) : vec{};
  for (int64_t m = 0; m < rows; ++m) {
    vec value = rest.start ? load(rest.start + n, columns) : load(y + m * ldy + n, columns), low = sum[m][0];
    if (rest.bits) low = keep(low, mask_of(rest.bits + m * rest.chunks, n)) * rest.scale;
    if (rest.gain) value += excess * (value - shift);
    store(y + m * ldy + n, value + low, columns);
  }
}

// s [ROWS, r] as operands
template <typename T>
void expand_rows(T *y, int64_t ldy, int64_t rows, int64_t N, const OperandOf<T> *s, int64_t r, const Packed<T> &packed,
                 const Rest &rest) {
  using O = OperandOf<T>;
  using Full = void (*)(T *, int64_t, int64_t, const O *, int64_t, const O *, int64_t, const Rest &);
  static constexpr Full FULL[2][2] = {{expand_full<T, false, false, O>, expand_full<T, false, true, O>},
                                      {expand_full<T, true, false, O>, expand_full<T, true, true, O>}};
  const int64_t depth = round_up(r, Operand<T>::width) / Operand<T>::width;
  int64_t n = 0;
  if (rows == ROWS) {
    const Full full = FULL[rest.gain != nullptr][rest.bits != nullptr];
    for (; n + 2 * LANES <= N; n += 2 * LANES) full(y, ldy, n, s, depth, packed.row(0), packed.n, rest);
  }
  for (; n < N; n += LANES) expand_any<T>(y, ldy, rows, n, N - n, s, depth, packed.row(0), packed.n, rest);
}

// ---- outer --------------------------------------------------------------------------------------------------------

// g[RANKS, WIDE * LANES] += s^T x, both as operands that pair up rows: s [steps, ld], x [steps, WIDTH]
template <typename T, int WIDE, typename O>
inline void outer_tile(const O *x, const O *s, int64_t ld, int64_t steps, float *g) {
  vec sum[RANKS][WIDE] = {};
  for (int64_t d = 0; d < steps; ++d) {
    vec right[WIDE];
    UNROLL
    for (int v = 0; v < WIDE; ++v) right[v] = shared(x + d * WIDTH + v * LANES);
    UNROLL
    for (int64_t r = 0; r < RANKS; ++r) {
      const vec left = Operand<T>::spread(s + d * ld + r);
      UNROLL
      for (int v = 0; v < WIDE; ++v) sum[r][v] = Operand<T>::multiply(sum[r][v], left, right[v]);
    }
  }
  UNROLL
  for (int64_t r = 0; r < RANKS; ++r) {
    UNROLL
    for (int v = 0; v < WIDE; ++v) store(g + r * WIDTH + v * LANES, load(g + r * WIDTH + v * LANES) + sum[r][v]);
  }
}

// A row, or two, as operands; zeros after the end.
template <typename T>
inline void pair_rows(float *out, const T *a, const T *, int64_t n, const uint16_t *mask, const uint16_t *) {
  copy_row(out, a, n, mask);
}
#if defined(__AVX512BF16__)
inline void pair_rows(uint32_t *out, const bf16 *a, const bf16 *b, int64_t n, const uint16_t *mask,
                      const uint16_t *next) {
  int64_t j = 0;
  if (!mask && b) {
    const __m512i even = _mm512_set1_epi32(0x00200000), step = _mm512_set1_epi32(0x00010001);
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i first =
        _mm512_add_epi32(even, _mm512_mullo_epi16(_mm512_or_si512(count, _mm512_slli_epi32(count, 16)), step));
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
      const __m512i left = _mm512_loadu_si512(a + j), right = _mm512_loadu_si512(b + j);
      _mm512_storeu_si512(out + j, _mm512_permutex2var_epi16(left, first, right));
      _mm512_storeu_si512(out + j + LANES, _mm512_permutex2var_epi16(left, second, right));
    }
  }
  for (; j < n; j += LANES) {
    const __mmask16 there = n - j >= LANES ? 0xffff : (1u << (n - j)) - 1;
    const __mmask16 first = mask ? mask[j / LANES] & there : there, second = next ? next[j / LANES] & there : there;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, a + j));
    const __m512i high = b ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, b + j)) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

// g[round_up(r, RANKS), WIDTH] += s^T (kept x)[count, n], s as operands [count / width, ld]. The columns are copied,
// since rows a power of two apart evict each other.
template <typename T>
void outer_block(const T *x, int64_t ldx, int64_t ahead, int64_t count, int64_t n, const uint16_t *bits, int64_t chunks,
                 const OperandOf<T> *s, int64_t ld, int64_t r, float *g) {
  using O = OperandOf<T>;
  constexpr int64_t W = Operand<T>::width;
  alignas(64) O tile[STEPS * WIDTH];
  for (int64_t m = 0; m < count; m += W) {
    const T *a = x + m * ldx, *b = m + 1 < count ? a + ldx : nullptr;
    const uint16_t *mask = bits ? bits + m * chunks : nullptr, *next = bits && b ? mask + chunks : nullptr;
    for (int64_t w = 0; w < W; ++w)
      for (int64_t j = 0; j < WIDTH; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(a + w * ldx + ahead + j);
    pair_rows(tile + m / W * WIDTH, a, b, n, mask, next);
  }
  const int64_t steps = round_up(count, W) / W;
  for (int64_t j = 0; j < r; j += RANKS) {
    int64_t v = 0;
    if constexpr (RANKS < 8)
      for (; v + 2 * LANES < n; v += 3 * LANES) outer_tile<T, 3>(tile + v, s + j, ld, steps, g + j * WIDTH + v);
    for (; v + LANES < n; v += 2 * LANES) outer_tile<T, 2>(tile + v, s + j, ld, steps, g + j * WIDTH + v);
    for (; v < n; v += LANES) outer_tile<T, 1>(tile + v, s + j, ld, steps, g + j * WIDTH + v);
  }
}

// base = gain * dy [count, n], and sums of dy and of dy * y added to total and dot
template <typename T, bool WHOLE>
inline void scale_and_sum_some(const T *dy, int64_t ld, const T *y, int64_t ldy, int64_t count, int64_t n,
                               const float *gain, T *base, int64_t ldb, float *total, float *dot) {
  const auto left = [&](int64_t v) { return WHOLE ? LANES : n - v * LANES; };
  vec sum[SOME], product[SOME], factor[SOME] = {};
  UNROLL
  for (int64_t v = 0; v < SOME; ++v) {
    sum[v] = load(total + v * LANES), product[v] = load(dot + v * LANES);
    if (gain && left(v) > 0) factor[v] = load(gain + v * LANES, left(v));
  }
  for (int64_t m = 0; m < count; ++m) {
    if (y) __builtin_prefetch(y + (m + 16) * ldy);
    UNROLL
    for (int64_t v = 0; v < SOME; ++v) {
      if (left(v) <= 0) break;
      const vec d = load(dy + m * ld + v * LANES, left(v));
      sum[v] += d;
      if (y) product[v] += d * load(y + m * ldy + v * LANES, left(v));
      if (gain) store(base + m * ldb + v * LANES, d * factor[v], left(v));
    }
  }
  UNROLL
  for (int64_t v = 0; v < SOME; ++v) store(total + v * LANES, sum[v]), store(dot + v * LANES, product[v]);
}

// The same of WIDTH columns, or the last few: total and dot are of WIDTH.
template <typename T>
void scale_and_sum(const T *dy, int64_t ld, const T *y, int64_t ldy, int64_t count, int64_t n, const float *gain,
                   T *base, int64_t ldb, float *total, float *dot) {
  for (int64_t at = 0; at < n; at += SOME * LANES) {
    const auto some = n - at >= SOME * LANES ? scale_and_sum_some<T, true> : scale_and_sum_some<T, false>;
    some(dy + at, ld, y ? y + at : nullptr, ldy, count, n - at, gain ? gain + at : nullptr, base ? base + at : nullptr,
         ldb, total + at, dot + at);
  }
}

}  // namespace
