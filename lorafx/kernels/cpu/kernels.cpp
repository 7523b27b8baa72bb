// Low-rank products beside a large matrix product, for row-major float32 and bfloat16, accumulated in float32.
//
//   narrow   s = D(x) right^T             [M, K] -> [M, R]     reads x once, makes D's masks
//   expand   y += (gain - 1) * (y - bias) + D(s right)         reads and writes y once
//   outer    g = s^T D(x)                 [R, K]               reads x once
//   grad_up  narrow and outer of one dy, its sums, and gain * dy, from one read
//
// Rows are shared out to the threads in blocks; sums over rows are kept per thread and added in thread order, so that
// two runs with as many threads are equal to the bit. Needs nothing but a C++17 compiler with vector extensions and
// OpenMP; bfloat16 uses the processor's dot products where it has them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Register tiles are arrays; only loops that are unrolled leave them in registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int64_t LANES = 16;  // floats a vector
constexpr int64_t ROWS = 8;    // rows of a register tile
constexpr int64_t BLOCK = 64;  // rows that are worked on together: they stay in the second-level cache
constexpr int64_t DEPTH = 256; // columns of a tile's rows that are copied together: they stay in the first-level cache
constexpr int64_t RANKS = 8;   // rows of a register tile of an outer product
constexpr int64_t WIDTH = 64;  // columns of a block that are copied together for outer products

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t uvec __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t hvec __attribute__((vector_size(LANES * sizeof(uint16_t))));
struct bf16 {
  uint16_t bits;
};

// Zeros, at a multiple of 64 bytes.
template <typename E> struct Buffer {
  struct Free {
    void operator()(E *p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<E[], Free> values;
  explicit Buffer(int64_t n) : values(static_cast<E *>(::operator new[](size_t(n) * sizeof(E), std::align_val_t(64)))) {
    std::fill_n(values.get(), n, E{});
  }
  E *data() const { return values.get(); }
  E &operator[](int64_t i) const { return values[size_t(i)]; }
};

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// ---- dropout ------------------------------------------------------------------------------------------------------

// Philox-4x32 (Salmon et al. 2011) for 16 counters at once, with the 7 rounds that its authors found to pass BigCrush.
struct Philox {
  uvec word[4];
  static void product(uvec a, uint32_t m, uvec &high, uvec &low) {
#if defined(__AVX512F__)
    const __m512i x = __m512i(a), f = _mm512_set1_epi32(int(m));
    const __m512i even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
    low = uvec(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
    high = uvec(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
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

inline uint16_t at_least(uvec v, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(__m512i(v), _mm512_set1_epi32(int(threshold)));
#else
  uint16_t bits = 0;
  for (int64_t l = 0; l < LANES; ++l) bits |= uint16_t(v[l] >= threshold) << l;
  return bits;
#endif
}

// One bit an element, set where it is kept: 16 random bits each, so that p is exact to 2^-16.
void draw_row(uint16_t *bits, int64_t chunks, int64_t row, int64_t adapter, uint64_t seed, float p) {
  const uint32_t threshold = uint32_t(p * 65536.0f + 0.5f);
  uvec lane;
  for (int64_t l = 0; l < LANES; ++l) lane[l] = uint32_t(l);
  for (int64_t i = 0; i < chunks; i += 8) {
    const Philox random(lane + uint32_t(i / 8 * LANES), uint32_t(row), uint32_t(adapter), seed);
    for (int64_t j = 0; j < std::min<int64_t>(8, chunks - i); ++j) {
      const uvec word = random.word[j / 2];
      bits[i + j] = at_least(j % 2 ? word >> 16 : word & 0xffffu, threshold);
    }
  }
}

// ---- operands -----------------------------------------------------------------------------------------------------

// What the inner loops multiply: one float, or two neighbouring bfloat16 in 32 bits.
template <typename T> struct Operand;
template <> struct Operand<float> {
  using type = float;
  static constexpr int64_t width = 1;
  static vec multiply(vec sum, vec left, vec right) { return sum + left * right; }
  static vec spread(float v) { return vec{} + v; }
};
#if defined(__AVX512BF16__)
template <> struct Operand<bf16> {
  using type = uint32_t;
  static constexpr int64_t width = 2;
  static vec multiply(vec sum, vec left, vec right) {
    return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(left), __m512bh(right)));
  }
  static vec spread(uint32_t v) { return vec(_mm512_castsi512_ps(_mm512_set1_epi32(int(v)))); }
};
#else
template <> struct Operand<bf16> : Operand<float> {};
#endif

// Two neighbours as one operand, or the first of them.
inline void put(float &out, float a, float) { out = a; }
inline void put(float &out, bf16 a, bf16) { out = widen(a); }
inline void put(uint32_t &out, bf16 a, bf16 b) { out = uint32_t(a.bits) | uint32_t(b.bits) << 16; }

// A matrix [depth, n] as operands [depth / width, up(n, LANES)]; element (i, j) is at source[i * rows + j * columns].
template <typename T> struct Packed {
  using O = typename Operand<T>::type;
  static constexpr int64_t W = Operand<T>::width;
  int64_t depth, n;
  Buffer<O> values;
  Packed(int64_t depth_, int64_t n_) : depth(up(depth_, W) / W), n(up(n_, LANES)), values(depth * n) {}
  void fill(const T *source, int64_t rows, int64_t columns, int64_t given, int64_t width) {
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t i = d * W;
        put(values[d * n + j], source[i * rows + j * columns],
            i + 1 < given ? source[(i + 1) * rows + j * columns] : T{});
      }
  }
  const O *row(int64_t d) const { return values.data() + d * n; }
};

// Rows of s, [count, r] to operands [count, up(r) / width].
template <typename T>
void gather(typename Operand<T>::type *out, const T *s, int64_t stride, int64_t count, int64_t r, int64_t depth) {
  constexpr int64_t W = Operand<T>::width;
  for (int64_t m = 0; m < count; ++m)
    for (int64_t d = 0; d < depth; ++d) {
      const T *p = s + m * stride + d * W;
      put(out[m * depth + d], p[0], W == 2 && d * W + 1 < r ? p[1] : T{});
    }
}

// ---- the three products, on a block of rows -----------------------------------------------------------------------

// sums[ROWS, n] += x[ROWS, depth] packed, x as operands
template <typename T, int VECTORS, typename O>
inline void narrow_tile(const O *x, int64_t stride, const O *packed, int64_t n, int64_t depth, float *sums, int64_t ld) {
  vec sum[ROWS][VECTORS];
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m)
    UNROLL
    for (int v = 0; v < VECTORS; ++v) sum[m][v] = load(sums + m * ld + v * LANES);
  for (int64_t d = 0; d < depth; ++d) {
    vec right[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) right[v] = bytes<vec>(packed + d * n + v * LANES);
    UNROLL
    for (int64_t m = 0; m < ROWS; ++m) {
      const vec left = Operand<T>::spread(x[m * stride + d]);
      UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[m][v] = Operand<T>::multiply(sum[m][v], left, right[v]);
    }
  }
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m)
    UNROLL
    for (int v = 0; v < VECTORS; ++v) store(sums + m * ld + v * LANES, sum[m][v]);
}

template <typename T> inline vec row_chunk(const T *x, int64_t k, int64_t rest, const uint16_t *bits) {
  const vec v = load(x + k, rest);
  return bits ? keep(v, bits[k / LANES]) : v;
}

inline void put_chunk(float *out, const float *x, int64_t k, int64_t rest, const uint16_t *bits) {
  store(out, row_chunk(x, k, rest, bits));
}
inline void put_chunk(float *out, const bf16 *x, int64_t k, int64_t rest, const uint16_t *bits) {
  store(out, row_chunk(x, k, rest, bits));
}
inline void put_chunk(uint32_t *out, const bf16 *x, int64_t k, int64_t rest, const uint16_t *bits) {
  store(reinterpret_cast<bf16 *>(out), row_chunk(x, k, rest, bits));  // exact: the values are bfloat16
}

// s[count, r] = scale * (kept x)[count, K] packed
template <typename T>
void narrow_block(const T *x, int64_t ldx, int64_t count, int64_t K, const Packed<T> &packed, const uint16_t *bits,
                  int64_t chunks, float scale, T *s, int64_t lds, int64_t r) {
  using O = typename Operand<T>::type;
  constexpr int64_t W = Operand<T>::width;
  alignas(64) O tile[ROWS * DEPTH];
  const Buffer<float> sums(ROWS * packed.n);
  for (int64_t m = 0; m < count; m += ROWS) {
    const int64_t rows = std::min(ROWS, count - m);
    std::fill_n(sums.data(), ROWS * packed.n, 0.0f);
    for (int64_t k = 0; k < K; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, K - k), stride = DEPTH / W;
      for (int64_t i = 0; i < ROWS; ++i) {
        O *to = tile + i * stride;
        if (i >= rows) {
          std::fill(to, to + stride, O(0));
          continue;
        }
        const T *from = x + (m + i) * ldx;
        const uint16_t *mask = bits ? bits + (m + i) * chunks : nullptr;
        for (int64_t j = 0; j < depth; j += LANES) put_chunk(to + j / W, from, k + j, K - k - j, mask);
      }
      const int64_t steps = up(depth, W) / W;
      const O *right = packed.row(k / W);
      int64_t n = 0;
      for (; n + 3 * LANES <= packed.n; n += 3 * LANES)
        narrow_tile<T, 3>(tile, stride, right + n, packed.n, steps, sums.data() + n, packed.n);
      for (; n + 2 * LANES <= packed.n; n += 2 * LANES)
        narrow_tile<T, 2>(tile, stride, right + n, packed.n, steps, sums.data() + n, packed.n);
      for (; n < packed.n; n += LANES)
        narrow_tile<T, 1>(tile, stride, right + n, packed.n, steps, sums.data() + n, packed.n);
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < r; j += LANES) store(s + (m + i) * lds + j, load(sums.data() + i * packed.n + j) * scale, r - j);
  }
}

// y[ROWS, VECTORS * LANES] += (gain - 1) * (y - bias) + scale * kept (s packed): exactly y where the gain is 1 and s packed 0
template <typename T, int VECTORS, typename O>
inline void expand_tile(T *y, int64_t ldy, int64_t rows, int64_t n, int64_t rest, const O *s, const Packed<T> &packed,
                        const uint16_t *bits, int64_t chunks, float scale, const float *gain, const float *bias) {
  vec sum[ROWS][VECTORS] = {};
  for (int64_t d = 0; d < packed.depth; ++d) {
    vec right[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) right[v] = bytes<vec>(packed.row(d) + n + v * LANES);
    UNROLL
    for (int64_t m = 0; m < ROWS; ++m) {
      const vec left = Operand<T>::spread(s[m * packed.depth + d]);
      UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[m][v] = Operand<T>::multiply(sum[m][v], left, right[v]);
    }
  }
  UNROLL
  for (int64_t m = 0; m < ROWS; ++m) {
    if (m >= rows) break;
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = n + v * LANES, left = rest - v * LANES;
      T *p = y + m * ldy + at;
      vec value = load(p, left), low = sum[m][v];
      if (bits) low = keep(low, bits[m * chunks + at / LANES]) * scale;
      if (gain) {
        const vec plain = bias ? value - load(bias + at, left) : value;
        value += (load(gain + at, left) - 1.0f) * plain;
      }
      store(p, value + low, left);
    }
  }
}

template <typename T>
void expand_block(T *y, int64_t ldy, int64_t count, int64_t N, const T *s, int64_t lds, int64_t r,
                  const Packed<T> &packed, const uint16_t *bits, int64_t chunks, float scale, const float *gain,
                  const float *bias) {
  using O = typename Operand<T>::type;
  const Buffer<O> rows_of_s(ROWS * packed.depth);
  for (int64_t m = 0; m < count; m += ROWS) {
    const int64_t rows = std::min(ROWS, count - m);
    if (rows < ROWS) std::fill_n(rows_of_s.data(), ROWS * packed.depth, O(0));
    gather<T>(rows_of_s.data(), s + m * lds, lds, rows, r, packed.depth);
    const uint16_t *mask = bits ? bits + m * chunks : nullptr;
    T *to = y + m * ldy;
    int64_t n = 0;
    for (; n + 2 * LANES <= N; n += 2 * LANES)
      expand_tile<T, 2>(to, ldy, rows, n, N - n, rows_of_s.data(), packed, mask, chunks, scale, gain, bias);
    for (; n < N; n += LANES)
      expand_tile<T, 1>(to, ldy, rows, n, N - n, rows_of_s.data(), packed, mask, chunks, scale, gain, bias);
  }
}

// g[RANKS, VECTORS * LANES] += s^T x, both as operands that pair up rows: s [steps, width], x [steps, WIDTH]
template <typename T, int VECTORS, typename O>
inline void outer_tile(const O *x, const O *s, int64_t width, int64_t steps, float *g, int64_t ldg, int64_t rest) {
  vec sum[RANKS][VECTORS] = {};
  for (int64_t d = 0; d < steps; ++d) {
    vec right[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) right[v] = bytes<vec>(x + d * WIDTH + v * LANES);
    UNROLL
    for (int64_t r = 0; r < RANKS; ++r) {
      const vec left = Operand<T>::spread(s[d * width + r]);
      UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Operand<T>::multiply(sum[r][v], left, right[v]);
    }
  }
  UNROLL
  for (int64_t r = 0; r < RANKS; ++r)
    UNROLL
    for (int v = 0; v < VECTORS; ++v)
      if (v * LANES < rest) store(g + r * ldg + v * LANES, load(g + r * ldg + v * LANES) + sum[r][v]);
}

// s[count, r] as operands [count / width, up(r, RANKS)]
template <typename T>
void transpose_pairs(typename Operand<T>::type *out, const T *s, int64_t lds, int64_t count, int64_t r, int64_t width) {
  constexpr int64_t W = Operand<T>::width;
  for (int64_t m = 0; m < count; m += W)
    for (int64_t j = 0; j < width; ++j)
      put(out[m / W * width + j], j < r ? s[m * lds + j] : T{}, W == 2 && j < r && m + 1 < count ? s[(m + 1) * lds + j] : T{});
}

// A row, or two, as operands.
inline void put_rows(float *out, const float *a, const float *, int64_t k, int64_t rest, const uint16_t *mask,
                     const uint16_t *) {
  store(out, row_chunk(a, k, rest, mask));
}
inline void put_rows(float *out, const bf16 *a, const bf16 *, int64_t k, int64_t rest, const uint16_t *mask,
                     const uint16_t *) {
  store(out, row_chunk(a, k, rest, mask));
}
inline void put_rows(uint32_t *out, const bf16 *a, const bf16 *b, int64_t k, int64_t rest, const uint16_t *mask,
                     const uint16_t *next) {
  const uvec low = uvec(row_chunk(a, k, rest, mask)) >> 16, high = b ? uvec(row_chunk(b, k, rest, next)) : uvec{};
  const uvec both = low | high;
  std::memcpy(out, &both, sizeof both);
}

// g[up(r, RANKS), up(K)] += s^T (kept x). Columns of x are copied, since rows a power of two apart evict each other.
template <typename T>
void outer_block(const T *x, int64_t ldx, int64_t count, int64_t K, const uint16_t *bits, int64_t chunks, const T *s,
                 int64_t lds, int64_t r, float *g, int64_t ldg) {
  using O = typename Operand<T>::type;
  constexpr int64_t W = Operand<T>::width;
  const int64_t width = up(r, RANKS), steps = up(count, W) / W;
  const Buffer<O> turned(steps * width);
  transpose_pairs<T>(turned.data(), s, lds, count, r, width);
  alignas(64) O tile[BLOCK * WIDTH];
  for (int64_t k = 0; k < K; k += WIDTH) {
    const int64_t n = std::min(WIDTH, K - k);
    for (int64_t m = 0; m < count; m += W) {
      const T *a = x + m * ldx, *b = m + 1 < count ? a + ldx : nullptr;
      const uint16_t *mask = bits ? bits + m * chunks : nullptr, *next = bits ? mask + chunks : nullptr;
      for (int64_t j = 0; j < n; j += LANES) put_rows(tile + m / W * WIDTH + j, a, b, k + j, n - j, mask, next);
    }
    for (int64_t j = 0; j < width; j += RANKS) {
      float *to = g + j * ldg + k;
      int64_t v = 0;
      for (; v + LANES < n; v += 2 * LANES)
        outer_tile<T, 2>(tile + v, turned.data() + j, width, steps, to + v, ldg, n - v);
      for (; v < n; v += LANES) outer_tile<T, 1>(tile + v, turned.data() + j, width, steps, to + v, ldg, n - v);
    }
  }
}

// Sums of each thread, [threads, size], added up in thread order. Their memory is kept for the next call: new pages
// would cost as much as the sums.
struct PerThread {
  static constexpr int64_t KEPT = 1 << 24;  // 64 MiB; more is given back
  int64_t size;
  int threads;
  Buffer<float> own;
  float *values;
  PerThread(int64_t size_, int threads_) : size(size_), threads(threads_), own(0) {
    static thread_local Buffer<float> kept(0);
    static thread_local int64_t held = 0;
    const int64_t needed = size * threads;
    if (needed > KEPT) {
      own = Buffer<float>(needed);
      values = own.data();
      return;
    }
    if (held < needed) {
      kept = Buffer<float>(needed);
      held = needed;
    } else {
      std::fill_n(kept.data(), needed, 0.0f);
    }
    values = kept.data();
  }
  float *mine() const { return values + omp_get_thread_num() * size; }
  void total(int64_t from, int64_t n, float scale, float *out) const {
    for (int64_t i = 0; i < n; ++i) out[i] = values[from + i];
    for (int t = 1; t < threads; ++t)
      for (int64_t i = 0; i < n; ++i) out[i] += values[t * size + from + i];
    if (scale != 1.0f)
      for (int64_t i = 0; i < n; ++i) out[i] *= scale;
  }
};

template <typename F> void over_blocks(int64_t M, int threads, const F &work) {
  const int64_t blocks = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) work(b * BLOCK, std::min(BLOCK, M - b * BLOCK));
}

template <typename T>
void narrow(const T *x, int64_t ldx, int64_t M, int64_t K, const T *right, int64_t r, T *s, int64_t lds, uint16_t *bits,
            float p, int64_t adapter, uint64_t seed, int threads) {
  const int64_t chunks = (K + LANES - 1) / LANES;
  Packed<T> packed(K, r);
  packed.fill(right, 1, K, K, r);
  over_blocks(M, threads, [&](int64_t m, int64_t count) {
    uint16_t *mask = bits ? bits + m * chunks : nullptr;
    if (bits)
      for (int64_t i = 0; i < count; ++i) draw_row(mask + i * chunks, chunks, m + i, adapter, seed, p);
    narrow_block(x + m * ldx, ldx, count, K, packed, mask, chunks, bits ? 1.0f / (1.0f - p) : 1.0f, s + m * lds, lds, r);
  });
}

template <typename T>
void expand(T *y, int64_t ldy, int64_t M, int64_t N, const T *s, int64_t lds, int64_t r, const T *right, int64_t rows,
            int64_t columns, const uint16_t *bits, float p, const float *gain, const float *bias, int threads) {
  const int64_t chunks = (N + LANES - 1) / LANES;
  Packed<T> packed(r, N);
  packed.fill(right, rows, columns, r, N);
  over_blocks(M, threads, [&](int64_t m, int64_t count) {
    expand_block(y + m * ldy, ldy, count, N, s + m * lds, lds, r, packed, bits ? bits + m * chunks : nullptr, chunks,
                 1.0f / (1.0f - p), gain, bias);
  });
}

template <typename T>
void outer(const T *x, int64_t ldx, int64_t M, int64_t K, const uint16_t *bits, float p, const T *s, int64_t lds, int64_t r,
           float *g, int threads) {
  const int64_t chunks = (K + LANES - 1) / LANES, ldg = up(K, LANES);
  const PerThread sums(up(r, RANKS) * ldg, threads);
  over_blocks(M, threads, [&](int64_t m, int64_t count) {
    outer_block(x + m * ldx, ldx, count, K, bits ? bits + m * chunks : nullptr, chunks, s + m * lds, lds, r, sums.mine(),
                ldg);
  });
  const float scale = bits ? 1.0f / (1.0f - p) : 1.0f;
  for (int64_t j = 0; j < r; ++j) sums.total(j * ldg, K, scale, g + j * K);
}

// base = gain * dy [count, N], and sums of dy and dy * y added to total and dot
template <typename T>
void scale_and_sum(const T *dy, const T *y, int64_t ld, int64_t ldy, int64_t count, int64_t N, const float *gain, T *base,
                   float *total, float *dot) {
  for (int64_t n = 0; n < N; n += LANES) {
    const int64_t rest = N - n;
    vec sum = {}, product = {};
    const vec factor = gain ? load(gain + n, rest) : vec{};
    for (int64_t m = 0; m < count; ++m) {
      const vec d = load(dy + m * ld + n, rest);
      sum += d;
      if (y) product += d * load(y + m * ldy + n, rest);
      if (gain) store(base + m * N + n, d * factor, rest);
    }
    if (total) store(total + n, load(total + n) + sum);
    if (dot) store(dot + n, load(dot + n) + product);
  }
}

template <typename T>
void grad_up(const T *dy, int64_t ld, int64_t M, int64_t N, const T *left, int64_t r, const T *s, int64_t lds, T *ds,
             int64_t ldds, float *dleft, const float *gain, T *base, const T *y, int64_t ldy, float *total, float *dot,
             int threads) {
  const int64_t ldg = up(N, LANES), width = up(r, RANKS);
  Packed<T> packed(N, r);
  packed.fill(left, r, 1, N, r);
  const PerThread sums((width + 2) * ldg, threads);
  over_blocks(M, threads, [&](int64_t m, int64_t count) {
    const T *rows = dy + m * ld;
    float *g = sums.mine();
    narrow_block(rows, ld, count, N, packed, nullptr, 0, 1.0f, ds + m * ldds, ldds, r);
    outer_block<T>(rows, ld, count, N, nullptr, 0, s + m * lds, lds, r, g, ldg);
    if (gain || total || dot)
      scale_and_sum(rows, y ? y + m * ldy : nullptr, ld, ldy, count, N, gain, base ? base + m * N : nullptr,
                    total ? g + width * ldg : nullptr, dot ? g + (width + 1) * ldg : nullptr);
  });
  for (int64_t j = 0; j < r; ++j) sums.total(j * ldg, N, 1.0f, dleft + j * N);
  if (total) sums.total(width * ldg, N, 1.0f, total);
  if (dot) sums.total((width + 1) * ldg, N, 1.0f, dot);
}

// ---- activations --------------------------------------------------------------------------------------------------

inline vec all(float v) { return vec{} + v; }
inline vec choose(vec a, vec b, vec if_less, vec otherwise) {  // a < b ? if_less : otherwise
  const auto mask = a < b;
  return vec((uvec(mask) & uvec(if_less)) | (~uvec(mask) & uvec(otherwise)));
}

// exp to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 below -87, inf above 88.
inline vec exponential(vec x) {
  const vec clamped = choose(x, all(-87.0f), all(-87.0f), choose(all(88.0f), x, all(88.0f), x));
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
  return choose(x, all(-87.0f), all(0.0f), choose(all(88.0f), x, all(INFINITY), p));
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
    const vec bell = exponential(-0.5f * h * h), z = choose(h, all(0.0f), -h, h) * 0.70710678118654752f;
    const vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec tail = 0.5f * t * p * bell;
    const vec below = choose(h, all(0.0f), tail, 1.0f - tail);
    return {h * below, below + h * 0.39894228040143268f * bell};
  }
};

// x = f(h) u and its gradients, from one pass; without u it is 1.
template <typename F, typename T>
void activation(const T *h, const T *u, const T *dx, T *x, T *dh, T *du, int64_t n, int threads) {
  const int64_t chunks = (n + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t at = i * LANES, rest = n - at;
    const Pair f = F::at(load(h + at, rest));
    const vec d = load(dx + at, rest);
    if (u) {
      const vec factor = load(u + at, rest);
      store(x + at, f.value * factor, rest);
      store(dh + at, d * factor * f.slope, rest);
      store(du + at, d * f.value, rest);
    } else {
      store(x + at, f.value, rest);
      store(dh + at, d * f.slope, rest);
    }
  }
}

}  // namespace

#define EXPORT_ACTIVATION(NAME, F, TYPE, T)                                                                            \
  extern "C" void NAME##_##TYPE(const T *h, const T *u, const T *dx, T *x, T *dh, T *du, int64_t n, int threads) {     \
    activation<F>(h, u, dx, x, dh, du, n, threads);                                                                    \
  }
#define EXPORT_ACTIVATIONS(TYPE, T)                                                                                    \
  EXPORT_ACTIVATION(gelu, Gelu, TYPE, T)                                                                               \
  EXPORT_ACTIVATION(gelu_tanh, GeluTanh, TYPE, T)                                                                      \
  EXPORT_ACTIVATION(silu, Silu, TYPE, T)
EXPORT_ACTIVATIONS(float32, float)
EXPORT_ACTIVATIONS(bfloat16, bf16)

#define EXPORT(NAME, T)                                                                                                \
  extern "C" void narrow_##NAME(const T *x, int64_t ldx, int64_t M, int64_t K, const T *right, int64_t r, T *s,        \
                                int64_t lds, uint16_t *bits, float p, int64_t adapter, uint64_t seed, int threads) {   \
    narrow(x, ldx, M, K, right, r, s, lds, bits, p, adapter, seed, threads);                                           \
  }                                                                                                                    \
  extern "C" void expand_##NAME(T *y, int64_t ldy, int64_t M, int64_t N, const T *s, int64_t lds, int64_t r,           \
                                const T *right, int64_t rows, int64_t columns, const uint16_t *bits, float p,          \
                                const float *gain, const float *bias, int threads) {                                   \
    expand(y, ldy, M, N, s, lds, r, right, rows, columns, bits, p, gain, bias, threads);                               \
  }                                                                                                                    \
  extern "C" void outer_##NAME(const T *x, int64_t ldx, int64_t M, int64_t K, const uint16_t *bits, float p,           \
                               const T *s, int64_t lds, int64_t r, float *g, int threads) {                            \
    outer(x, ldx, M, K, bits, p, s, lds, r, g, threads);                                                               \
  }                                                                                                                    \
  extern "C" void grad_up_##NAME(const T *dy, int64_t ld, int64_t M, int64_t N, const T *left, int64_t r, const T *s,  \
                                 int64_t lds, T *ds, int64_t ldds, float *dleft, const float *gain, T *base,           \
                                 const T *y, int64_t ldy, float *total, float *dot, int threads) {                     \
    grad_up(dy, ld, M, N, left, r, s, lds, ds, ldds, dleft, gain, base, y, ldy, total, dot, threads);                  \
  }
EXPORT(float32, float)
EXPORT(bfloat16, bf16)
