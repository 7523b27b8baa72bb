// A layer's weight [out, in], dense or in a base format, and the products with it.
//
// What is packed is read in tiles that stay in a core's cache between the table and the product. A product over a side
// that is longer than a tile is a sum of several, in float32, so that it is rounded about as often as a whole one.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "packed.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t TILE_BYTES = 1 << 20;
constexpr int64_t TILE = 256;  // elements of the product's own side
constexpr int64_t PART = 512;  // rows of gain * x

class Weight {
 public:
  explicit Weight(const Tensor &dense) : tensors({dense}), layout{dense.size(0), dense.size(1), 0, 0} {}
  Weight(at::TensorList given, c10::string_view name, at::IntArrayRef described, at::ScalarType type)
      : format(name), dtype(type) {
    for (const Tensor &t : given) tensors.push_back(t.contiguous());
    TORCH_CHECK(described.size() == 4, "a packed weight's layout has four numbers, not ", described.size());
    std::copy_n(described.begin(), 4, layout.begin());
    if (known()) TORCH_CHECK(fits(), "the tensors do not hold a ", format, " weight of layout ", described);
  }

  int64_t out() const { return layout[0]; }
  int64_t in() const { return layout[1]; }

  Tensor dense() const {
    if (format.empty()) return tensors[0];
    return rows(0, out());
  }

  Tensor rows(int64_t start, int64_t stop) const {
    TORCH_CHECK(0 <= start && start <= stop && stop <= out(), "rows ", start, " to ", stop, " of ", out());
    if (known()) return tile(start, stop, 0, in());
    static const auto reference =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("lorafx::packed_reference", "")
            .typed<Tensor(at::TensorList, c10::string_view, at::IntArrayRef, at::ScalarType, int64_t, int64_t)>();
    return reference.call(tensors, format, layout, dtype, start, stop);
  }

  // These rows, some of them.
  Tensor select(const Tensor &at) const {
    if (format.empty()) return tensors[0].index_select(0, at);
    Tensor found = at::empty({at.numel(), in()}, tensors[0].options().dtype(dtype));
    const int64_t *const row = at.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < at.numel(); ++i) found.select(0, i).copy_(rows(row[i], row[i] + 1).select(0, 0));
    return found;
  }

  // x W^T + bias
  Tensor linear(const Tensor &x, const Maybe &bias) const {
    if (format.empty() || !known()) return at::linear(x, dense(), bias);
    check(x, in());
    TORCH_CHECK(!bias || bias->sizes().equals({out()}), "a bias has ", out(), " values");
    const Tensor flat = x.reshape({-1, x.size(-1)});
    Tensor y = x.new_empty({flat.size(0), out()});
    for (int64_t top = 0; top < out(); top += TILE) {
      const int64_t rows = std::min(TILE, out() - top);
      product(y.narrow(1, top, rows), flat, in(), bias ? Maybe(bias->narrow(0, top, rows)) : std::nullopt,
              [&](int64_t left, int64_t right) { return tile(top, top + rows, left, right).t(); });
    }
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() = out();
    return at::_unsafe_view(y, sizes);
  }

  // Whether linear() is add_product() on rows that are the bias, to the bit.
  bool adds_exactly(const Tensor &x, const Tensor &bias) const {
    return format.empty() && x.scalar_type() == at::kFloat && x.is_contiguous() && bias.scalar_type() == at::kFloat &&
           bias.is_contiguous() && bias.dim() == 1;
  }

  // y += x W^T
  void add_product(Tensor &y, const Tensor &x) const { y.addmm_(x, tensors[0].t()); }

  // y += (gain * x) W, into memory of its own where there is no y yet. Of a gain * x there are only ever some rows.
  void add_mm(Tensor &y, const Tensor &x, const Maybe &gain = std::nullopt) const {
    if (!format.empty() && known()) {
      const Tensor found = packed_mm(x, gain);
      y = y.defined() ? y.add_(found) : found;
      return;
    }
    const Tensor weight = dense();
    if (!gain) {
      y = y.defined() ? y.addmm_(x, weight) : at::mm(x, weight);
      return;
    }
    const bool first = !y.defined();
    if (first) y = x.new_empty({x.size(0), in()});
    const Tensor factor = gain->to(x.scalar_type());
    for (int64_t m = 0; m < x.size(0); m += PART) {
      const int64_t count = std::min(PART, x.size(0) - m);
      Tensor part = y.narrow(0, m, count);
      const Tensor scaled = x.narrow(0, m, count).mul(factor);
      first ? at::mm_out(part, scaled, weight) : part.addmm_(scaled, weight);
    }
  }

 private:
  std::vector<Tensor> tensors;
  std::string format;
  std::array<int64_t, 4> layout;  // out, in, block size, whether scales are quantised too
  at::ScalarType dtype = at::kFloat;

  bool known() const {
    return (format == "nf4" || format == "int8") && (dtype == at::kFloat || dtype == at::kBFloat16);
  }
  // Whether there are as many codes and scales, of their dtypes, as reading takes.
  bool fits() const {
    const auto holds = [&](size_t i, at::ScalarType type, int64_t count) {
      return i < tensors.size() && tensors[i].scalar_type() == type && tensors[i].numel() >= count;
    };
    if (layout[0] < 1 || layout[1] < 1 || layout[2] < 1) return false;
    const int64_t count = layout[0] * layout[1], blocks = (count + layout[2] - 1) / layout[2];
    if (format == "int8") return holds(0, at::kChar, count) && holds(1, at::kFloat, layout[0]);
    if (!holds(0, at::kByte, (count + 1) / 2)) return false;
    if (!layout[3]) return holds(1, at::kFloat, blocks);
    return holds(1, at::kByte, blocks) && holds(2, at::kFloat, (blocks + Nf4::NESTED - 1) / Nf4::NESTED) &&
           holds(3, at::kFloat, 1);
  }
  // A product of tiles would not notice that x is wider than the weight.
  void check(const Tensor &x, int64_t width) const {
    TORCH_CHECK(x.scalar_type() == dtype, "the weight is read as ", dtype, ", and the input is ", x.scalar_type());
    TORCH_CHECK(x.size(-1) == width, "the input has ", x.size(-1), " columns, and the weight takes ", width);
  }
  Tensor tile(int64_t top, int64_t bottom, int64_t left, int64_t right) const {
    const Tensor found = at::empty({bottom - top, right - left}, tensors[0].options().dtype(dtype));
    const auto fill = [&](auto *out) {
      const int64_t threads = at::get_num_threads();
      const auto read = [&](const auto &matrix) { read_tile(matrix, in(), top, bottom, left, right, out, threads); };
      if (format == "int8") {
        read(Int8{tensors[0].const_data_ptr<int8_t>(), tensors[1].const_data_ptr<float>(), in()});
      } else if (layout[3]) {
        read(Nf4{tensors[0].const_data_ptr<uint8_t>(), layout[2], nullptr, tensors[1].const_data_ptr<uint8_t>(),
                 tensors[2].const_data_ptr<float>(), *tensors[3].const_data_ptr<float>()});
      } else {
        read(Nf4{tensors[0].const_data_ptr<uint8_t>(), layout[2], tensors[1].const_data_ptr<float>()});
      }
    };
    if (dtype == at::kFloat)
      fill(found.data_ptr<float>());
    else
      fill(reinterpret_cast<bf16 *>(found.data_ptr<at::BFloat16>()));
    return found;
  }

  // The gain is multiplied into what is read.
  Tensor packed_mm(const Tensor &x, const Maybe &gain) const {
    check(x, out());
    Tensor y = x.new_empty({x.size(0), in()});
    for (int64_t left = 0; left < in(); left += TILE) {
      const int64_t columns = std::min(TILE, in() - left);
      product(y.narrow(1, left, columns), x, out(), std::nullopt, [&](int64_t top, int64_t bottom) {
        Tensor found = tile(top, bottom, left, left + columns);
        return gain ? found.mul_(gain->narrow(0, top, bottom - top).unsqueeze(1)) : found;
      });
    }
    return y;
  }

  // y = x W + bias, where piece(from, to) are those rows of W. As much of the side that is summed over goes into a tile
  // as fits beside TILE elements of the other.
  template <typename F> void product(Tensor y, const Tensor &x, int64_t side, const Maybe &bias, const F &piece) const {
    const int64_t depth = TILE_BYTES / (TILE * int64_t(c10::elementSize(dtype)));
    if (side <= depth) {
      bias ? at::addmm_out(y, *bias, x, piece(0, side)) : at::mm_out(y, x, piece(0, side));
      return;
    }
    Tensor sum;
    for (int64_t from = 0; from < side; from += depth) {
      const int64_t to = std::min(side, from + depth);
      const Tensor one = at::mm(x.narrow(1, from, to - from), piece(from, to));
      sum = sum.defined() ? sum.add_(one) : one.to(at::kFloat);
    }
    y.copy_(bias ? sum.add_(*bias) : sum);
  }
};

}  // namespace
