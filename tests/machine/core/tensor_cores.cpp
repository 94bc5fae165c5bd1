// SPDX-License-Identifier: Apache-2.0
// Products of small matrices that a warp holds in registers: D = A B + C, 16 x 8, sums in float32.
#include <algorithm>
#include <limits>

#include "tensor_cores.h"

namespace machine {

double tensor_factor(const Step& x, std::uint32_t word, int h) {
  if (x.has("TF32")) return std::bit_cast<float>(cut_to_tf32(word));
  return from_half(word >> 16 * h, x.has("BF16"));
}

namespace {

int exponent(double x) {
  int e = std::numeric_limits<int>::min();
  if (x != 0) std::frexp(x, &e);
  return e;
}

// terms aligned to the largest, one bit below float32's last kept, the rest cut: as published measurements of the A100
// describe it
float truncated_sum(float c, const double* terms, int n, double plain) {
  if (!std::isfinite(plain)) return static_cast<float>(plain);
  int top = exponent(c);
  for (int i = 0; i < n; ++i) top = std::max(top, exponent(terms[i]));
  if (top == std::numeric_limits<int>::min()) return 0.0f;
  const double unit = std::ldexp(1.0, top - 25);
  double sum = std::trunc(c / unit);
  for (int i = 0; i < n; ++i) sum += std::trunc(terms[i] / unit);
  Rounding rounding(FE_TOWARDZERO);
  volatile double scaled = sum * unit;
  volatile float out = static_cast<float>(scaled);
  return out;
}

// shape -> columns of A: m16n8k4, k8, k16
int depth(const Step& x) {
  if (!x.has("F32")) throw Fault("a matrix product that is not in float32");
  return x.has("16816") ? 16 : x.has("1688") ? 8 : 4;
}

void warp_product(Step& x) {
  x.whole_warp();
  const bool tf32 = x.has("TF32");
  const int k_all = depth(x), per_word = tf32 ? 1 : 2, chunk = 4 * per_word, block = tf32 ? 4 : 8;
  double a[16][16], b[16][8];
  float out[16][8];
  rows_in_registers(x, k_all, a);
  for (int l = 0; l < kLanes; ++l)
    for (int k = 0; k < k_all / 4; ++k) {
      const int k0 = k / per_word, h = k % per_word;
      b[chunk * k0 + per_word * (l % 4) + h][l / 4] = tensor_factor(x, x.get(x.operand(2).index + k0, l), h);
    }
  const auto accumulator = [&](int l, int half, int j) {  // operand 3: registers, or zero
    const int base = x.operand(3).index;
    return base == kZeroRegister ? 0.0f : std::bit_cast<float>(x.get(base + 2 * half + j, l));
  };
  for (int l = 0; l < kLanes; ++l)
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 2; ++j) {
        const int row = l / 4 + 8 * half, column = l % 4 * 2 + j;
        float sum = accumulator(l, half, j);
        for (int k = 0; k < k_all; k += block) {
          double terms[16];
          for (int q = 0; q < block; ++q) terms[q] = a[row][k + q] * b[k + q][column];
          sum = tensor_sum(x, sum, terms, block);
        }
        out[row][column] = sum;
      }
  for (int l = 0; l < kLanes; ++l)
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 2; ++j)
        x.put(x.operand(0).index + 2 * half + j, l, __float_as_uint(out[l / 4 + 8 * half][l % 4 * 2 + j]));
}

}  // namespace

void rows_in_registers(const Step& x, int depth, double (*a)[16]) {
  const int per_word = x.has("TF32") ? 1 : 2;
  for (int l = 0; l < kLanes; ++l)
    for (int k = 0; k < depth / 4; ++k)
      for (int half = 0; half < 2; ++half) {
        const int k0 = k / per_word, h = k % per_word;
        const std::uint32_t word = x.get(x.operand(1).index + 2 * k0 + half, l);
        a[l / 4 + 8 * half][4 * per_word * k0 + per_word * (l % 4) + h] = tensor_factor(x, word, h);
      }
}

float tensor_sum(const Step& x, float c, const double* terms, int n) {
  double sum = c;
  for (int i = 0; i < n; ++i) sum += terms[i];
  return x.machine.schedule.truncated_sums ? truncated_sum(c, terms, n, sum) : static_cast<float>(sum);
}

void add_tensor_cores(Table& table) { table.warp("HMMA", "16816 1688 1684 F32 TF32 BF16", warp_product); }

}  // namespace machine
