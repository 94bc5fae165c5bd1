// SPDX-License-Identifier: Apache-2.0
// The shape of torch.sort's kernel for rows of 513 to 1,024 elements on CUDA: cub sorts a row's keys and 64-bit
// places in a block of 32 threads, 32 elements each, loaded and stored through shared memory. Modelled beside ranking.
#include <cub/block/block_load.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_store.cuh>
#include <cstdint>

constexpr int kThreads = 32, kItems = 32;

template <class T>
using Load = cub::BlockLoad<T, kThreads, kItems, cub::BLOCK_LOAD_TRANSPOSE>;
template <class T>
using Store = cub::BlockStore<T, kThreads, kItems, cub::BLOCK_STORE_TRANSPOSE>;
using Sort = cub::BlockRadixSort<float, kThreads, kItems, std::int64_t>;

extern "C" __global__ void __launch_bounds__(kThreads) sort_kernel(int n, float* x, std::int64_t* places) {
  __shared__ union {
    typename Load<float>::TempStorage keys_in;
    typename Load<std::int64_t>::TempStorage places_in;
    typename Sort::TempStorage sort;
    typename Store<float>::TempStorage keys_out;
    typename Store<std::int64_t>::TempStorage places_out;
  } scratch;
  x += std::int64_t(blockIdx.x) * n, places += std::int64_t(blockIdx.x) * n;
  float keys[kItems];
  std::int64_t values[kItems];
  Load<float>(scratch.keys_in).Load(x, keys, n, __int_as_float(0x7fffffff));
  __syncthreads();
  Load<std::int64_t>(scratch.places_in).Load(places, values, n, 0);
  __syncthreads();
  Sort(scratch.sort).Sort(keys, values);
  __syncthreads();
  Store<float>(scratch.keys_out).Store(x, keys, n);
  __syncthreads();
  Store<std::int64_t>(scratch.places_out).Store(places, values, n);
}
