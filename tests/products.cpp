// The kernels' products beside plain loops in double, at sizes that fit no tile: test_cpu_widths.py builds and runs it.
#include <cmath>
#include <cstdio>
#include <random>

#include "activation.h"
#include "jobs.h"
#include "packed.h"

std::mt19937 generator(0);
std::normal_distribution<float> normal;
int failures = 0;

void expect(bool right, const char *what, double found, double wanted) {
  if (!right && ++failures < 9) std::printf("%s: %g, not %g\n", what, found, wanted);
}

template <typename T> struct Matrix {
  int64_t rows, columns;
  std::vector<T> values;
  Matrix(int64_t m, int64_t n) : rows(m), columns(n), values(m * n) {
    for (T &v : values) round_to(v, normal(generator));
  }
  double at(int64_t i, int64_t j) const { return widen(values[i * columns + j]); }
};

template <typename T> void check_products(int64_t m, int64_t k, int64_t r, bool drops, bool gains) {
  const Matrix<T> x(m, k), y(m, k);
  const Matrix<float> right(r, k), gain(1, k), bias(1, k);
  const int64_t words = (k + WORD - 1) / WORD;
  std::vector<uint16_t> bits(m * words, drops ? 0 : 0xffff);
  const double bound = sizeof(T) == 2 ? 2e-2 : 2e-5;
  const auto factor = [&](void *small) {
    Adapter a{small, k, 1, true, r};
    if (drops) a.bits = bits.data(), a.p = 0.25f, a.factor = 1.25f;
    return a;
  };
  const auto kept = [&](int64_t i, int64_t j) {
    return bits[i * words + j / WORD] >> j % WORD & 1 ? drops ? 1.25 : 1.0 : 0.0;
  };
  const auto compare = [&](const char *what, double found, double wanted, double size) {
    expect(std::abs(found - wanted) <= bound * (1 + size), what, found, wanted);
  };

  Matrix<T> s(m, r), big = y;
  Matrix<float> outer(r, k);
  const Matrix<T> given = s;
  Job down{NARROW, (void *)x.values.data(), k, m, k, s.values.data(), r, {factor((void *)right.values.data())}};
  down.seed = 7;
  Job up{EXPAND, big.values.data(), k, m, k, (void *)given.values.data(), r, {factor((void *)right.values.data())}};
  if (gains) up.gain = gain.values.data(), up.bias = bias.values.data();
  Job grad{OUTER, (void *)x.values.data(), k, m, k, (void *)given.values.data(), r, {factor(outer.values.data())}};
  run<T>({down}, 2), run<T>({up, grad}, 2);

  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < r; ++c) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < k; ++j) {
        const double term = kept(i, j) * x.at(i, j) * right.at(c, j);
        sum += term, size += std::abs(term);
      }
      compare("narrow", s.at(i, c), sum, size);
    }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < k; ++j) {
      double sum = gains ? y.at(i, j) + (gain.at(0, j) - 1) * (y.at(i, j) - bias.at(0, j)) : y.at(i, j), size = 9;
      for (int64_t c = 0; c < r; ++c) {
        const double term = kept(i, j) * given.at(i, c) * right.at(c, j);
        sum += term, size += std::abs(term);
      }
      compare("expand", big.at(i, j), sum, size);
    }
  for (int64_t c = 0; c < r; ++c)
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < m; ++i) {
        const double term = kept(i, j) * given.at(i, c) * x.at(i, j);
        sum += term, size += std::abs(term);
      }
      compare("outer", outer.at(c, j), sum, size);
    }
  if (drops) {
    double share = 0;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < k; ++j) share += kept(i, j) > 0;
    expect(std::abs(share / double(m * k) - 0.75) < 0.05, "kept", share / double(m * k), 0.75);
  }
}

// The masks are the same on every processor.
void check_masks() {
  uint16_t bits[9];
  draw_row(bits, 9, 3, 1, 0x123456789abcdefULL, 0.5f);
  uint64_t sum = 0;
  for (const uint16_t word : bits) sum = sum * 31 + word;
  std::printf("masks %llu\n", (unsigned long long)sum);
}

void check_rest() {
  float h[37], x[37], dx[37], wanted[37];
  for (int i = 0; i < 37; ++i) h[i] = 3 * normal(generator), dx[i] = 1;
  activate<Gelu, float>(h, nullptr, dx, x, nullptr, 37);
  for (int i = 0; i < 37; ++i) {
    wanted[i] = 0.5f * h[i] * std::erfc(-h[i] * 0.70710678f);
    expect(std::abs(x[i] - wanted[i]) < 1e-5, "gelu", x[i], wanted[i]);
  }
  const float scale[3] = {0.5f, 1.0f, 2.0f};
  uint8_t codes[96];
  for (uint8_t &c : codes) c = uint8_t(generator());
  const Nf4 nf4{codes, 64, scale};
  for (int from : {0, 1, 63}) {
    float read[192];
    bf16 rounded[192];
    nf4.read(from, 190, read), nf4.read(from, 190, rounded);
    for (int i = from; i < 190; ++i) {
      const float value = Nf4::TABLE[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * scale[i / 64];
      bf16 near;
      round_to(near, value);
      expect(read[i - from] == value, "nf4", read[i - from], value);
      expect(rounded[i - from].bits == near.bits, "nf4 rounded", widen(rounded[i - from]), widen(near));
    }
  }
}

int main() {
  for (bool drops : {false, true})
    for (bool gains : {false, true})
      for (int64_t r : {1, 5, 8, 16, 33}) {
        check_products<float>(67, 145, r, drops, gains), check_products<bf16>(67, 145, r, drops, gains);
        check_products<float>(6, 64, r, drops, gains), check_products<bf16>(131, 48, r, drops, gains);
      }
  check_masks();
  check_rest();
  return failures != 0;
}
