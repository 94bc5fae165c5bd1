// SPDX-License-Identifier: Apache-2.0
// Soft ranks of rows too long for the registers or shared memory of one block. Up to 23,552 floats a block still sorts
// its row, in two runs that it merges, and only the sums lie in global memory (cached). Longer rows go through
// workspace: keys and strength (`prepare_keys_kernel`), sorted keys, then fit and ranks (`finish_ranks_kernel`). A row
// of half values is sorted by counting its at most 65,536 distinct ones (`count_keys_kernel`), any other by a segmented
// radix sort. Which float row holds half values alone (an upcast copy) is found on the device, row by row.
#pragma once

#include "soft_rank.cuh"

namespace kdkernels {

struct LongCall {
  RankCall rank;
  int64_t first;          // row of the batch's first row; the workspace below holds the batch alone
  void* keys;             // Key [batch, n]
  void* sorted;           // Key [batch, n]
  int* valid;             // [batch] elements that are there, -1 for a poisoned row
  int* format;            // [batch] Dtype: the half format that holds all of a row, kFloat: it is sorted
  int* table;             // [batch, 65536], first position of a half value's code; null: nothing is counted
  unsigned char* memory;  // [gridDim.x, layout], in `rank_big_kernel` the sums alone
};

// the rows of a batch that the radix sort has to do
struct NeedsSort {
  const int* valid;
  const int* format;
  __host__ __device__ bool operator()(int row) const { return valid[row] > 0 && !is_half(format[row]); }
};

constexpr int kParts = 4096;  // of a sorted row, whose last keys `finish_ranks_kernel` holds
constexpr int kCodes = 65536, kHalfCodes = kCodes / 2;

// two sorted runs of `run` keys each -> the first m of their merge
template <int T, class Key, class Put>
__device__ void merge_runs(const Group<T>& group, const Key* a, const Key* b, int run, int m, Put put) {
  const int share = (2 * run + T - 1) / T, first = min(m, group.rank() * share), last = min(m, first + share);
  int low = max(0, first - run), high = min(first, run);
  while (low < high) {
    const int i = (low + high) / 2;
    if (a[i] <= b[first - 1 - i]) {
      low = i + 1;
    } else {
      high = i;
    }
  }
  int i = low, j = first - low;
  for (int p = first; p < last; ++p) put(p, j >= run || (i < run && a[i] <= b[j]) ? a[i++] : b[j++]);
}

template <class Value, int T, int kItems>
__host__ __device__ constexpr size_t big_sort_bytes() {
  using Key = typename KeyOf<Value>::Key;
  constexpr size_t kSort = sort_bytes<Key, T, kItems>(), kRun = T * kItems * sizeof(Key);
  return ((kSort > kRun ? kSort : kRun) + 15) / 16 * 16;
}
template <class Value, int T, int kItems>
__host__ __device__ inline size_t big_row_bytes(int n, int shift) {
  return Group<T>::kBytes + big_sort_bytes<Value, T, kItems>() + T * kItems * sizeof(Value) +
         layout_of<Value>(n, shift, false, n).total;
}

template <class Value, int T, int kItems>
__global__ void __launch_bounds__(T, 1) rank_big_kernel(LongCall call) {
  using Key = typename KeyOf<Value>::Key;
  constexpr int kRun = T * kItems;
  constexpr int kStages = (big_sort_bytes<Value, T, kItems>() + kRun * sizeof(Key)) / (padded(kLeaf) * sizeof(double));
  KDK_DYNAMIC_SHARED(memory);
  const RankCall& rank = call.rank;
  const Group<T> group{memory};
  unsigned char* sorting = memory + Group<T>::kBytes;
  Key* later = reinterpret_cast<Key*>(sorting);
  Key* early = reinterpret_cast<Key*>(sorting + big_sort_bytes<Value, T, kItems>());
  unsigned char* base = reinterpret_cast<unsigned char*>(early + kRun);
  const Layout at = layout_of<Value>(rank.n, rank.shift, false, rank.n);
  double* sum = reinterpret_cast<double*>(call.memory) + static_cast<int64_t>(blockIdx.x) * (padded(rank.n) + 1);
  for (int64_t row = blockIdx.x; row < rank.rows; row += gridDim.x) {
    RowFacts facts{0, false, static_cast<double>(NAN)};
#pragma unroll 1
    for (int run = 0; run < 2; ++run) {
      Key item[kItems];
      const RowFacts part = load_row<Value>(group, rank.x, rank.partner, row, run * kRun, rank.n, rank.descending,
                                            sorting, item);
      facts.m += part.m, facts.poisoned |= part.poisoned;
      sort_keys<T>(item, sorting, constant_bits(rank.x.dtype));
#pragma unroll
      for (int j = 0; j < kItems; ++j) (run ? later : early)[group.rank() * kItems + j] = item[j];
      group.sync();
    }
    if (facts.poisoned) {
      if (group.rank() == 0) rank.eps[row] = facts.eps;
      emit_poison<Value>(group, rank, row);
      continue;
    }
    Fit<Value, true, false, false, true> fit;
    fit.key.key = reinterpret_cast<Key*>(base + at.key), fit.sum = sum, fit.blocks = blocks_at(base, at, rank.shift);
    fit.stage = reinterpret_cast<double*>(sorting), fit.stages = kStages < T ? kStages : T;
    fit.m = facts.m, fit.kl = rank.kl;
    merge_runs(group, early, later, kRun, facts.m, [&](int p, Key key) { fit.key.at(p) = key; });
    group.sync();
    fit.eps = rank.strength.of(row, rank.strength.relative ? spread_of_sorted(group, fit) : 1.0);
    fit.inverse = inverse_of(fit.eps);
    if (group.rank() == 0) rank.eps[row] = fit.eps;
    fit.solve(group);
    fit.record_all(group, rank.centre(facts.m));
    emit_ranks(group, fit, rank, row, [&](Key key) { return fit.template place<bits_of(2 * kRun)>(key); });
    group.sync();
  }
}

// the key of a half or bfloat16 value in 16 bits, in the same order
__device__ __forceinline__ int code_of(unsigned key, int format) {
  if (format == kBfloat16) return static_cast<int>(key >> 16);
  const unsigned u = __half_as_ushort(__float2half_rn(decode<float>(key)));
  return static_cast<int>(u & 0x8000u ? ~u & 0xFFFFu : u | 0x8000u);
}
__device__ __forceinline__ unsigned key_of_code(int code, int format) {
  // a negative bfloat16's lower half is zero, and turned over in the key
  if (format == kBfloat16) return static_cast<unsigned>(code) << 16 | (code & 0x8000 ? 0u : 0xFFFFu);
  const unsigned u = code & 0x8000 ? static_cast<unsigned>(code) ^ 0x8000u : ~static_cast<unsigned>(code) & 0xFFFFu;
  return encode(__half2float(__ushort_as_half(static_cast<unsigned short>(u))));
}

// bit `format` set: the format does not hold the value of this key
__device__ __forceinline__ unsigned formats_without(unsigned key) {
  const unsigned half = key_of_code(code_of(key, kHalf), kHalf);
  const unsigned bfloat = key_of_code(code_of(key, kBfloat16), kBfloat16);
  return (half != key ? 1u << kHalf : 0u) | (bfloat != key ? 1u << kBfloat16 : 0u);
}

// x -> keys, eps, the number of elements that are there, the format of the row
template <class Value, int T>
__global__ void __launch_bounds__(T, 1) prepare_keys_kernel(LongCall call) {
  using Key = typename KeyOf<Value>::Key;
  KDK_DYNAMIC_SHARED(memory);
  const RankCall& rank = call.rank;
  const Group<T> group{memory};
  for (int64_t row = blockIdx.x; row < rank.rows; row += gridDim.x) {
    Key* keys = static_cast<Key*>(call.keys) + row * rank.n;
    bool poisoned = false;
    unsigned without = 0;
    int count = 0;
    const int64_t where = call.first + row;
    each_key<Value>(group, rank.x, rank.partner, where, rank.n, rank.descending, poisoned, [&](int i, Key key) {
      keys[i] = key;
      count += key != kAbsent<Value>;
      if constexpr (sizeof(Key) == 4) {
        if (call.table && rank.x.dtype == kFloat && key != kAbsent<Value>) without |= formats_without(key);
      }
    });
    int format = call.table ? rank.x.dtype : kFloat;
    if (call.table && format == kFloat) {
      without = group.reduce(without, [](unsigned a, unsigned b) { return a | b; });
      format = !(without >> kBfloat16 & 1) ? kBfloat16 : !(without >> kHalf & 1) ? kHalf : kFloat;
    }
    const RowFacts facts = facts_of<Value>(group, rank.strength, call.first + row, poisoned, count, [&](auto visit) {
      for (int i = group.rank(); i < rank.n; i += T) visit(keys[i]);
    });
    if (group.rank() == 0) {
      rank.eps[call.first + row] = facts.eps;
      call.valid[row] = facts.poisoned ? -1 : facts.m;
      call.format[row] = format;
    }
  }
}

struct Count {
  int count;
  __device__ static Count from_lane(const Count& c, int delta) { return {__shfl_up_sync(kAllLanes, c.count, delta)}; }
  __device__ Count then(const Count& next) const { return {count + next.count}; }
};

// sorts the rows that have a format by counting: negative numbers first, then the others, 128 KiB of bins each time
template <int T>
__global__ void __launch_bounds__(T, 1) count_keys_kernel(LongCall call) {
  static_assert(kHalfCodes % T == 0);
  KDK_DYNAMIC_SHARED(memory);
  const RankCall& rank = call.rank;
  const Group<T> group{memory};
  int* bins = reinterpret_cast<int*>(memory + kScratchBytes);
  constexpr int kShare = kHalfCodes / T;
  for (int64_t row = blockIdx.x; row < rank.rows; row += gridDim.x) {
    const int format = call.format[row];
    if (call.valid[row] < 0 || !is_half(format)) continue;
    const unsigned* keys = static_cast<const unsigned*>(call.keys) + row * rank.n;
    unsigned* sorted = static_cast<unsigned*>(call.sorted) + row * rank.n;
    int* table = call.table + row * kCodes;
    int before = 0;  // elements of the half done
    for (int half = 0; half < 2; ++half) {
      for (int i = group.rank(); i < kHalfCodes; i += T) bins[i] = 0;
      group.sync();
      for (int i = group.rank(); i < rank.n; i += T) {
        const unsigned key = keys[i];
        if (key == kAbsent<float>) continue;
        const int code = code_of(key, format) - half * kHalfCodes;
        if (code >= 0 && code < kHalfCodes) atomicAdd(bins + code, 1);
      }
      group.sync();
      int own = 0;
      for (int i = 0; i < kShare; ++i) own += bins[group.rank() * kShare + i];
      int position = group.before(Count{own}, Count{0}).count;
      for (int i = 0; i < kShare; ++i) {
        const int bin = group.rank() * kShare + i, count = bins[bin];
        bins[bin] = position;
        table[half * kHalfCodes + bin] = before + position;
        position += count;
      }
      const int total = group.sum(own);
      group.sync();
      const int share = (total + T - 1) / T, last = min(total, (group.rank() + 1) * share);
      for (int p = min(total, group.rank() * share); p < last;) {
        // the last bin that starts at or before p is not empty
        int low = 0, high = kHalfCodes;
        while (high - low > 1) {
          const int bin = (low + high) / 2;
          if (bins[bin] <= p) {
            low = bin;
          } else {
            high = bin;
          }
        }
        const int stop = min(last, high < kHalfCodes ? bins[high] : total);
        const unsigned key = key_of_code(low + half * kHalfCodes, format);
        for (; p < stop; ++p) sorted[before + p] = key;
      }
      group.sync();
      before += total;
    }
  }
}

template <class Value, int T>
__global__ void __launch_bounds__(T, 1) finish_ranks_kernel(LongCall call) {
  using Key = typename KeyOf<Value>::Key;
  KDK_DYNAMIC_SHARED(memory);
  const RankCall& rank = call.rank;
  const Group<T> group{memory};
  const Layout at = layout_of<Value>(rank.n, rank.shift, true, 0);
  unsigned char* base = call.memory + blockIdx.x * at.total;
  for (int64_t row = blockIdx.x; row < rank.rows; row += gridDim.x) {
    if (call.valid[row] < 0) {
      emit_poison<Value>(group, rank, call.first + row);
      continue;
    }
    const double eps = rank.eps[call.first + row];
    Fit<Value, false, false> fit;
    fit.key.key = static_cast<Key*>(call.sorted) + row * rank.n, fit.sum = reinterpret_cast<double*>(base + at.sum);
    fit.blocks = blocks_at(base, at, rank.shift);
    fit.m = call.valid[row], fit.kl = rank.kl, fit.eps = eps, fit.inverse = inverse_of(eps);
    // the last key of every part of the row, in shared memory: a search is left with a part, of one cache line mostly
    int part_shift = 5;
    while ((fit.m - 1) >> part_shift >= kParts) ++part_shift;
    const int parts = fit.m > 0 ? ((fit.m - 1) >> part_shift) + 1 : 0;
    Key* last = reinterpret_cast<Key*>(memory + kScratchBytes);
    for (int i = group.rank(); i < parts; i += T) last[i] = fit.key.at(min(fit.m, (i + 1) << part_shift) - 1);
    fit.solve(group);
    fit.record_all(group, rank.centre(fit.m));
    const int format = call.format[row];
    const int* table = is_half(format) ? call.table + row * kCodes : nullptr;
    emit_ranks(group, fit, rank, call.first + row, [&](Key key) {
      if (key == kAbsent<Value>) return 0;
      if constexpr (sizeof(Key) == 4) {
        if (table) return table[code_of(key, format)];
      }
      // the first part whose last key is not below
      int low = 0, high = parts - 1;
      while (low < high) {
        const int part = (low + high) / 2;
        if (last[part] < key) {
          low = part + 1;
        } else {
          high = part;
        }
      }
      return fit.position(key, low << part_shift, min(fit.m, (low + 1) << part_shift) - 1);
    });
    group.sync();
  }
}

}  // namespace kdkernels
