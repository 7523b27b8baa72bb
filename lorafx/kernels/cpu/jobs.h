// Products of a large matrix with the narrow matrices of adapters, row-major float32 or bfloat16, accumulated in
// float32.
//
//   NARROW   s_j = factor_j * D_j(big) small_j               reads big once, draws D's masks
//   EXPAND   big += (gain - 1) * (big - bias) + sum_j factor_j * D_j(s_j small_j); with start, that is big's rows before
//   OUTER    small_j = factor_j * s_j^T D_j(big)             also sums over the rows, and gain * big
//
// In EXPAND the factor counts where D_j drops; elsewhere it is in s_j or small_j. s_j are columns of one matrix, side
// by side; small_j is an adapter's factor, [wide, r] or [r, wide]. A call does several jobs: first the small operands
// of all are packed, then blocks of rows (NARROW, EXPAND) or columns (OUTER) are given to whichever thread is free.
// Each element is one thread's sum in one order, so that results are equal to the bit, whatever the number of threads.
// Needs a C++20 compiler with vector extensions and OpenMP; bfloat16 uses the processor's dot products where it has
// them.

#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <omp.h>
#include <vector>

#include "activation.h"
#include "dropout.h"
#include "products.h"

namespace {

enum Kind { NARROW, EXPAND, OUTER };

struct Adapter {
  void *small;
  int64_t along_rank, along_wide;  // strides of small
  bool is_float;                   // its dtype: float32, or that of big
  int64_t r;
  uint16_t *bits = nullptr;  // [rows, columns / 16] if it drops
  int64_t number = 0;        // which mask
  float p = 0.0f, factor = 1.0f;
};

struct Job {
  Kind kind;
  void *big;
  int64_t ld, rows, columns;
  void *s;  // of big's dtype; what NARROW makes may be float32
  int64_t lds;
  std::vector<Adapter> adapters;
  uint64_t seed = 0;
  bool s_is_float = false;
  const float *gain = nullptr, *bias = nullptr, *start = nullptr;
  void *base = nullptr;  // [rows, columns], one row after the other
  const void *y = nullptr;
  int64_t ldy = 0;
  float *total = nullptr, *dot = nullptr;
  // With h, what is made of big is the gradient of x = f(h) u: then x and the gradients follow, that of h in its place.
  Activation f = GELU;
  const void *h = nullptr, *u = nullptr;  // [rows, columns], one row after the other
  void *x = nullptr, *du = nullptr;
};

constexpr int64_t BLOCK = 64 / ROWS * ROWS;  // rows that one thread works on together
constexpr int64_t SPAN = 512;                // columns, likewise
constexpr int64_t PACKED = 128;              // columns (or rows) that it packs together
constexpr int64_t SMALL = 1 << 16;           // multiplications that are not worth a second thread
constexpr int64_t KEPT = 1 << 26;            // bytes of scratch memory that are kept for the next call

// Memory, at a multiple of 64 bytes. New pages would cost as much as the products, so what is not too much is kept.
struct Scratch {
  struct Free {
    void operator()(char *p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<char[], Free> values;
  int64_t size = 0;
  char *get(int64_t needed) {
    if (size < needed || size > KEPT) {
      values.reset();
      size = 0;
      values.reset(static_cast<char *>(::operator new[](size_t(needed), std::align_val_t(64))));
      size = needed;
    }
    return values.get();
  }
};

// Neighbouring adapters that see the same elements, as one operand: columns [column, column + r) of s.
template <typename T> struct Panel {
  const Adapter *adapters;
  int64_t count, column, r;
  Packed<T> packed;
};

template <typename T> struct Prepared {
  const Job *job;
  std::vector<Panel<T>> panels;

  int64_t rows(const Panel<T> &panel) const {
    return job->kind == NARROW ? job->columns : job->kind == EXPAND ? panel.r : job->rows;
  }
  explicit Prepared(const Job &given) : job(&given) {
    for (int64_t j = 0, column = 0; j < int64_t(given.adapters.size()); column += given.adapters[size_t(j++)].r) {
      const Adapter &adapter = given.adapters[size_t(j)];
      if (!adapter.bits && !panels.empty() && !panels.back().adapters->bits) {
        panels.back().r += adapter.r;
        ++panels.back().count;
      } else {
        panels.push_back({&adapter, 1, column, adapter.r, {}});
      }
    }
    for (Panel<T> &panel : panels)
      panel.packed.n = given.kind == EXPAND ? round_up(given.columns, LANES) : round_up(panel.r, LANES);
  }
  int64_t bytes() const {
    int64_t sum = 0;
    for (const Panel<T> &panel : panels) sum += round_up(Packed<T>::bytes(rows(panel), panel.packed.n), 64);
    return sum;
  }
  char *place(char *memory) {
    for (Panel<T> &panel : panels) {
      panel.packed.values = reinterpret_cast<typename Packed<T>::Element *>(memory);
      memory += round_up(Packed<T>::bytes(rows(panel), panel.packed.n), 64);
    }
    return memory;
  }
};

// Part [from, to) of a job: of what is packed, its wide side; of the work, rows or columns.
template <typename T> struct Task {
  const Prepared<T> *prepared;
  int64_t from, to;
};

template <typename T> void cut(std::vector<Task<T>> &tasks, const Prepared<T> &prepared, int64_t length, int64_t size) {
  for (int64_t at = 0; at < length; at += size) tasks.push_back({&prepared, at, std::min(length, at + size)});
}

template <typename T> void pack(const Task<T> &task) {
  const Job &job = *task.prepared->job;
  const int64_t W = Operand<T>::width;
  for (const Panel<T> &panel : task.prepared->panels) {
    const Packed<T> &packed = panel.packed;
    const int64_t rows = task.prepared->rows(panel);
    // Zeros where operands go on after the end.
    if (job.kind == EXPAND) {
      for (int64_t i = rows; i < round_up(rows, W); ++i)
        for (int64_t k = task.from; k < task.to; ++k) packed.put(i, k, 0.0f);
    } else {
      for (int64_t k = task.from; k < task.to; ++k)
        for (int64_t i = panel.r; i < packed.n; ++i) packed.put(k, i, 0.0f);
      for (int64_t k = rows; k < round_up(rows, W) && task.to == rows; ++k)
        for (int64_t i = 0; i < packed.n; ++i) packed.put(k, i, 0.0f);
    }
    const int64_t from = task.from, wide = task.to - task.from;
    if (job.kind == OUTER) {
      const T *s = static_cast<const T *>(job.s) + panel.column + from * job.lds;
      const int64_t even = wide / W * W;  // only the last part ends between two
      packed.fill(from, 0, s, job.lds, 1, even, panel.r);
      packed.fill(from + even, 0, s + even * job.lds, job.lds, 1, wide - even, panel.r);
      continue;
    }
    for (int64_t j = 0, column = 0; j < panel.count; column += panel.adapters[j++].r) {
      const Adapter &a = panel.adapters[j];
      const auto fill = [&](const auto *small) {
        small += from * a.along_wide;
        job.kind == NARROW ? packed.fill(from, column, small, a.along_wide, a.along_rank, wide, a.r)
                           : packed.fill(column, from, small, a.along_rank, a.along_wide, a.r, wide);
      };
      a.is_float ? fill(static_cast<const float *>(a.small)) : fill(static_cast<const T *>(a.small));
    }
  }
}

// A thread's own memory for one task: some rows or tiles of sums. (Where there is none, the program ends.)
inline float *own(int64_t floats) {
  static thread_local Scratch scratch;
  return reinterpret_cast<float *>(scratch.get(floats * int64_t(sizeof(float))));
}

template <typename T> void narrow(const Task<T> &task) {
  const Job &job = *task.prepared->job;
  const int64_t chunks = (job.columns + WORD - 1) / WORD;
  const T *x = static_cast<const T *>(job.big);
  for (int64_t m = task.from; m < task.to; m += ROWS) {
    const int64_t rows = std::min(ROWS, task.to - m);
    for (const Panel<T> &panel : task.prepared->panels) {
      const Adapter &first = *panel.adapters;
      uint16_t *bits = first.bits ? first.bits + m * chunks : nullptr;
      if (bits)
        for (int64_t i = 0; i < rows; ++i) draw_row(bits + i * chunks, chunks, m + i, first.number, job.seed, first.p);
      float *sums = own(ROWS * panel.packed.n);
      narrow_rows<T>(x + m * job.ld, job.ld, rows, job.columns, panel.packed, bits, chunks, sums);
      int64_t column = 0;
      for (int64_t j = 0; j < panel.count; column += panel.adapters[j++].r) {
        const Adapter &a = panel.adapters[j];
        const auto write = [&](auto *s) {
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t n = 0; n < a.r; n += LANES)
              store(s + (m + i) * job.lds + panel.column + column + n,
                    load(sums + i * panel.packed.n + column + n, a.r - n) * a.factor, a.r - n);
        };
        job.s_is_float ? write(static_cast<float *>(job.s)) : write(static_cast<T *>(job.s));
      }
    }
  }
}

template <typename T> void expand(const Task<T> &task) {
  using O = OperandOf<T>;
  constexpr int64_t W = Operand<T>::width;
  const Job &job = *task.prepared->job;
  const int64_t chunks = (job.columns + WORD - 1) / WORD;
  T *y = static_cast<T *>(job.big);
  const T *s = static_cast<const T *>(job.s);
  for (int64_t m = task.from; m < task.to; m += ROWS) {
    const int64_t rows = std::min(ROWS, task.to - m);
    Rest rest = {job.gain, job.bias, job.start, nullptr, chunks, 1.0f};
    for (const Panel<T> &panel : task.prepared->panels) {
      const int64_t depth = round_up(panel.r, W);
      float *const memory = own(ROWS * depth);
      Packed<T> gathered{reinterpret_cast<typename Packed<T>::Element *>(memory), 1};
      for (int64_t i = 0; i < ROWS; ++i) {
        const T *row = s + (m + i) * job.lds + panel.column;
        if (IN_PLACE<T> && i < rows && panel.r == depth)
          std::memcpy(gathered.values + i * depth, row, size_t(depth) * sizeof(T));
        else
          for (int64_t d = 0; d < depth; ++d)
            gathered.put(i * depth + d, 0, i < rows && d < panel.r ? widen(row[d]) : 0.0f);
      }
      rest.bits = panel.adapters->bits ? panel.adapters->bits + m * chunks : nullptr;
      rest.scale = panel.adapters->factor;
      expand_rows<T>(y + m * job.ld, job.ld, rows, job.columns, reinterpret_cast<const O *>(memory), panel.r,
                     panel.packed, rest);
      rest.gain = rest.start = nullptr;  // once
    }
    for (int64_t i = m; job.h && i < m + rows; ++i) {
      const auto row = [&](auto *p) { return p ? static_cast<const T *>(p) + i * job.columns : nullptr; };
      ACTIVATE<T>[job.f](row(job.h), row(job.u), y + i *job.ld, const_cast<T *>(row(job.x)),
                         const_cast<T *>(row(job.du)), job.columns);
    }
  }
}

// The sums of one tile of columns.
template <typename T> void write_outer(const Prepared<T> &prepared, int64_t from, int64_t n, const float *g) {
  const Job &job = *prepared.job;
  for (const Panel<T> &panel : prepared.panels) {
    const float *row = g;
    for (int64_t j = 0; j < panel.count; row += panel.adapters[j++].r * WIDTH) {
      const Adapter &a = panel.adapters[j];
      const auto write = [&](auto *small) {
        for (int64_t i = 0; i < a.r; i += LANES)
          for (int64_t k = 0; k < n; k += LANES) {
            const int64_t ranks = std::min(LANES, a.r - i), wide = std::min(LANES, n - k);
            vec square[LANES] = {};
            for (int64_t l = 0; l < ranks; ++l) square[l] = load(row + (i + l) * WIDTH + k) * a.factor;
            auto *out = small + (from + k) * a.along_wide + i * a.along_rank;
            if (a.along_rank == 1) {
              turn(square);
              for (int64_t l = 0; l < wide; ++l) store(out + l * a.along_wide, square[l], ranks);
            } else {
              for (int64_t l = 0; l < ranks; ++l) store(out + l * a.along_rank, square[l], wide);
            }
          }
      };
      a.is_float ? write(static_cast<float *>(a.small)) : write(static_cast<T *>(a.small));
    }
    g += panel.packed.n * WIDTH;
  }
  if (job.total) std::copy_n(g, n, job.total + from);
  if (job.dot) std::copy_n(g + WIDTH, n, job.dot + from);
}

// In tiles of some rows and WIDTH columns, the columns of the same rows one after the other, as they lie in memory.
template <typename T> void outer(const Task<T> &task) {
  constexpr int64_t W = Operand<T>::width, COUNT = STEPS * W;
  const Job &job = *task.prepared->job;
  const int64_t chunks = (job.columns + WORD - 1) / WORD;
  int64_t ranks = 0;
  for (const Panel<T> &panel : task.prepared->panels) ranks += panel.packed.n;
  const int64_t size = (ranks + 2) * WIDTH, tiles = (task.to - task.from + WIDTH - 1) / WIDTH;
  float *const sums = own(size * tiles);
  std::fill_n(sums, size * tiles, 0.0f);
  for (int64_t m = 0; m < job.rows; m += COUNT) {
    const int64_t count = std::min(COUNT, job.rows - m);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t at = task.from + i * WIDTH, n = std::min(WIDTH, task.to - at);
      const int64_t ahead = i + 1 < tiles ? WIDTH : COUNT * job.ld - i * WIDTH;
      const T *x = static_cast<const T *>(job.big) + m * job.ld + at;
      float *g = sums + i * size;
      for (const Panel<T> &panel : task.prepared->panels) {
        const uint16_t *bits = panel.adapters->bits;
        outer_block<T>(x, job.ld, ahead, count, n, bits ? bits + m * chunks + at / WORD : nullptr, chunks,
                       panel.packed.row(m / W), panel.packed.n, panel.r, g);
        g += panel.packed.n * WIDTH;
      }
      if (job.base || job.total || job.dot)
        scale_and_sum(x, job.ld, job.y ? static_cast<const T *>(job.y) + m * job.ldy + at : nullptr, job.ldy, count, n,
                      job.base ? job.gain + at : nullptr,
                      job.base ? static_cast<T *>(job.base) + m * job.columns + at : nullptr, job.columns, g,
                      g + WIDTH);
    }
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t at = task.from + i * WIDTH;
    write_outer(*task.prepared, at, std::min(WIDTH, task.to - at), sums + i * size);
  }
}

// All jobs at once: they must not need one another's results.
template <typename T> void run(const std::vector<Job> &jobs, int64_t threads) {
  std::vector<Prepared<T>> prepared;
  int64_t bytes = 0, work = 0;
  for (const Job &job : jobs) {
    prepared.emplace_back(job);
    bytes += prepared.back().bytes();
    for (const Panel<T> &panel : prepared.back().panels) work += panel.r * job.rows * job.columns;
  }
  if (work < SMALL) threads = 1;
  static thread_local Scratch scratch;
  char *memory = scratch.get(bytes);
  std::vector<Task<T>> packing, working;
  for (Prepared<T> &one : prepared) {
    memory = one.place(memory);
    const Job &job = *one.job;
    const bool by_column = job.kind == OUTER;
    const int64_t length = by_column ? job.columns : job.rows, share = (length + threads - 1) / threads;
    cut(packing, one, by_column ? job.rows : job.columns, PACKED);
    cut(working, one, length,
        by_column ? std::clamp(round_up(share, share < WIDTH ? WORD : WIDTH), WORD, SPAN)
                  : std::clamp(round_up(share, ROWS), ROWS, BLOCK));
  }
  static void (*const DO[])(const Task<T> &) = {narrow<T>, expand<T>, outer<T>};
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < packing.size(); ++i) pack(packing[i]);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < working.size(); ++i) DO[working[i].prepared->job->kind](working[i]);
  }
}

}  // namespace
