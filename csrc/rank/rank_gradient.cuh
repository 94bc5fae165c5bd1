// SPDX-License-Identifier: Apache-2.0
// J u of one row, J = d rank / d theta, from the blocks of its elements:
//   l2: (u - mean_B u) / eps        kl: r (u - sum_B r u / R_B) / eps
#pragma once

#include "isotonic.cuh"
#include "pool.cuh"

namespace kdkernels {

// each(visit) calls visit(i, u, r, name) for the elements of this thread, i counted from its first one, u = 0 and
// name = -1 where there is nothing; `first` is the name of the first. finish(run) calls run(store), and store(i, g)
// takes every result. A row of strength 0 has no names
template <class Value, bool kKl, class Pool, int T, class Each, class Finish>
__device__ void rank_gradient(const Group<T>& group, const Pool& pool, int slots, double eps, int first, Each each,
                              Finish finish) {
  using Key = typename KeyOf<Value>::Key;
  pool.clear(group, slots, true);
  Frequent<Pool> frequent(pool, first >> 1);
  Key bits = 0;  // of the largest |u|; those of NaN are above all others
  each([&](int, double u, double, int name) {
    bits = max(bits, KeyOf<Value>::bits(fabs(static_cast<Value>(u))));
    if constexpr (kKl) frequent.template add<true, false>(name >> 1, pool.part(0.0, 0.0));
  });
  if constexpr (kKl) frequent.template finish<true, false>();
  const Value largest = KeyOf<Value>::value(group.reduce(bits, [](Key a, Key b) { return max(a, b); }));
  if constexpr (kKl) group.sync();
  const auto unit = Unit<Value>::of(largest);
  if (isfinite(largest)) {
    each([&](int, double u, double r, int name) {
      double part = u;
      if constexpr (kKl) {
        // R_B = sum_B w is known exactly from where the block stands
        const double c = name >= 0 ? pool.count[name >> 1] : 1;
        part *= fmin(r / (0.5 * c * (2 * name + c + 1)), 1.0);
      }
      frequent.template add<!kKl, true>(name >> 1, pool.part(part, unit.to));
    });
    frequent.template finish<!kKl, true>();
  }
  group.sync();
  const double back = isfinite(largest) ? unit.back : static_cast<double>(NAN);
  if constexpr (kKl) {
    for (int i = group.rank(); i < slots; i += T) pool.settle(i, pool.total(i).sum * (1.0 / pool.one()) * back);
  } else {
    settle_means(group, pool, slots, back);
  }
  group.sync();
  const double inverse = eps == eps ? inverse_of(eps) : eps, nothing = eps == eps ? 0.0 : eps;
  finish([&](auto store) {
    each([&](int i, double u, double r, int name) {
      const double d = u - pool.shared(max(name, 0) >> 1);
      store(i, name >= 0 ? (kKl ? r * d : d) * inverse : nothing);
    });
  });
}

// the same of l2 and a short row of floats where float64 is slow
template <int T, class Each, class Finish>
__device__ void whole_gradient(const Group<T>& group, const SmallPool& pool, int slots, double eps, int first,
                               Each each, Finish finish) {
  pool.clear(group, slots, true);
  Frequent<SmallPool> frequent(pool, first >> 1);
  unsigned bits = 0;
  each([&](int, float u, double, int) { bits = max(bits, __float_as_uint(fabsf(u))); });
  const float largest = __uint_as_float(group.reduce(bits, [](unsigned a, unsigned b) { return max(a, b); }));
  const int exponent = max(-126, min(static_cast<int>(__float_as_uint(largest) >> 23) - 127, 126));
  const float to = __uint_as_float(static_cast<unsigned>(127 - exponent) << 23);
  if (isfinite(largest)) {
    each([&](int, float u, double, int name) {
      frequent.template add<true, true>(name >> 1, pool.whole_part(u * to));
    });
    frequent.template finish<true, true>();
  }
  group.sync();
  for (int slot = group.rank(); slot < slots; slot += T) {
    int count;
    const long long total = pool.whole_total(slot, count);
    if (count) pool.settle(slot, pair_of(whole_quotient(total << 11, count), 0x1p-42f));
  }
  group.sync();
  // 1 / eps as a mantissa and two powers of two
  const double inverse = inverse_of(eps);
  const int power = exponent_of(inverse), all = max(-252, min(power + exponent, 252));
  const Pair mantissa = pair_of(inverse * power_of_two(-max(power, -1022)));
  const float half = __uint_as_float(static_cast<unsigned>(all / 2 + 127) << 23);
  const float other = __uint_as_float(static_cast<unsigned>(all - all / 2 + 127) << 23);
  const float nothing = eps == eps ? 0.0f : NAN, poison = isfinite(largest) ? nothing : NAN;
  finish([&](auto store) {
    each([&](int i, float u, double, int name) {
      const Pair mean = pool.shared_pair(max(name, 0) >> 1), d = sum_of(u * to, -mean.high);
      const Pair g = product_of({d.high, d.low - mean.low}, mantissa);
      store(i, name >= 0 ? (g.high + g.low) * half * other + poison : nothing);
    });
  });
}

}  // namespace kdkernels
