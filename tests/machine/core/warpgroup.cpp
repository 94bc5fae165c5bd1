// SPDX-License-Identifier: Apache-2.0
// sm_90: products of a warpgroup. Each of its four warps makes 16 rows of D = A B + D with B, and mostly A, in shared
// memory. They run in groups, early or late: when they are issued, or when the group is waited for.
#include <cstdio>

#include "tensor_cores.h"

namespace machine {
namespace {

constexpr int kMostDepth = 16, kMostColumns = 256;

// a matrix in shared memory, in rows of `width` bytes whose 16-byte pieces are exchanged (swizzled) within 8 rows
struct Matrix {
  std::uint64_t start, leading, stride;
  int width, swizzle;
  bool transposed;

  Matrix(std::uint64_t descriptor, bool transposed)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        transposed(transposed) {
    const int mode = descriptor >> 62;
    if (mode == 0 || (descriptor >> 49 & 7)) throw Fault("a matrix descriptor that is not modelled");
    width = 256 >> mode, swizzle = mode == 1 ? 7 : mode == 2 ? 3 : 1;
  }

  // element k of row r of A, or of column r of B
  std::uint64_t address(int r, int k, int bytes) const {
    const int in_row = width / bytes;
    std::uint64_t at = start;
    if (transposed)
      at += r / in_row * leading + r % in_row * bytes + k % 8 * width + k / 8 * stride;
    else
      at += r / 8 * stride + r % 8 * width + k * bytes;
    return at ^ (at >> 7 & swizzle) << 4;
  }
};

double element(const Step& x, const Matrix& m, int r, int k) {
  const int bytes = x.has("TF32") ? 4 : 2;
  const std::uint64_t at = m.address(r, k, bytes);
  Region& shared = x.machine.shared.front();
  if (!shared.holds(at, bytes)) throw Fault("a matrix beyond the end: " + shared.place(at));
  std::uint32_t word = 0;
  shared.read(x.access(), at, &word, bytes);
  return tensor_factor(x, word, 0);
}

struct Shape {
  int rows, columns, depth;

  explicit Shape(const Step& x) {
    const bool read = std::sscanf(x.at.modifiers[0].c_str(), "%dx%dx%d", &rows, &columns, &depth) == 3;
    if (!read || rows != 64 || columns > kMostColumns || depth > kMostDepth || !x.has("F32"))
      throw Fault("a matrix product that is not modelled");
  }
};

bool first_in_registers(const Step& x) { return x.operand(1).kind == Kind::kRegister; }
const Operand& descriptors(const Step& x) { return x.operand(first_in_registers(x) ? 2 : 1); }
const Operand& accumulator(const Step& x) { return x.operand(first_in_registers(x) ? 3 : 2); }

void multiply(const Step& x, const Product& product) {
  const Shape shape(x);
  static thread_local double a[16][kMostDepth], b[kMostDepth][kMostColumns];
  const Matrix second(product.second, descriptors(x).part & 2);
  for (int k = 0; k < shape.depth; ++k)
    for (int j = 0; j < shape.columns; ++j) b[k][j] = element(x, second, j, k);
  if (first_in_registers(x)) {
    rows_in_registers(x, shape.depth, a);
  } else {
    const Matrix first(product.first, descriptors(x).part & 1);
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < shape.depth; ++k) a[i][k] = element(x, first, 16 * (x.warp.id % 4) + i, k);
  }
  for (int l = 0; l < kLanes; ++l)
    for (int r = 0; r < shape.columns / 2; ++r) {
      const int row = l / 4 + 8 * (r / 2 % 2), column = 8 * (r / 4) + 2 * (l % 4) + r % 2;
      double terms[kMostDepth];
      for (int k = 0; k < shape.depth; ++k) terms[k] = a[row][k] * b[k][column];
      const float before = product.accumulates ? __uint_as_float(x.get(accumulator(x).index + r, l)) : 0.0f;
      x.put(x.operand(0).index + r, l, __float_as_uint(tensor_sum(x, before, terms, shape.depth)));
    }
}

void issue(Step& x) {
  x.whole_warp();
  const auto descriptor = [&](int k) {
    const std::uint32_t* words = &x.warp.uniforms[descriptors(x).uniform + k];
    return words[0] | std::uint64_t(words[1]) << 32;
  };
  Product product{&x.at, descriptor(0), descriptor(2), accumulator(x).index != kZeroRegister};
  bool ends_group = false;  // the last operand names the group's barrier
  for (int k = 2; k < x.count(); ++k) {
    if (x.operand(k).is_predicate()) product.accumulates &= Lane{x, 0}.p(k);
    ends_group |= x.operand(k).kind == Kind::kNone;
  }
  if (x.machine.schedule.early) return multiply(x, product);
  x.warp.open_products.push_back(product);
  if (!ends_group) return;
  x.warp.product_groups.push_back(std::move(x.warp.open_products));
  x.warp.open_products.clear();
}

// until at most `left` groups are in flight
void wait_for_products(Step& x) {
  if (!x.has("DEPBAR")) return;
  auto& groups = x.warp.product_groups;
  const auto left = static_cast<std::size_t>(x.operand(1).value);
  for (; groups.size() > left; groups.erase(groups.begin()))
    for (const Product& product : groups.front())
      multiply({x.machine, x.warp, *product.at, kAllLanes, kAllLanes}, product);
}

}  // namespace

void add_warpgroups(Table& table) {
  std::string shapes;
  for (int n = 8; n <= kMostColumns; n += 8)
    for (int k : {8, 16}) shapes += "64x" + std::to_string(n) + "x" + std::to_string(k) + " ";
  table.warp("HGMMA", shapes + "F32 TF32 BF16", issue);
  table.warp("WARPGROUP", "ARRIVE DEPBAR LE", wait_for_products);
}

}  // namespace machine
