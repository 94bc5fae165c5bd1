// SPDX-License-Identifier: Apache-2.0
// Row and column moments of a pair of Gram panels in one pass: k and l are read once and nothing of their size is
// stored, where PyTorch needs five reductions a side and three products as temporaries. Sums are float64.
// The roof is memory bandwidth: 2 r c elements read, 10 (r + c) doubles written.
//
// The panel is cut into tiles whose size does not depend on the number of threads; each tile writes its own partial
// sums and these are added in tile order, so the result has the same bits for any thread count.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/lanes.h"

namespace kdkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMoments = 5;       // sum k, sum l, sum k^2, sum k l, sum l^2
constexpr int64_t kTileRows = 64;     // partial column sums cost 5 / 64 of the panel's elements
constexpr int64_t kTileColumns = 512; // 5 x 512 doubles of column sums stay in the first-level cache

template <class T>
struct Panel {
  const T* k;         // [r, c], row stride ldk
  const T* l;         // [r, c], row stride ldl
  int64_t ldk, ldl;
  int64_t r, c;
  int64_t diagonal;   // entries with j == i + diagonal are left out; in [-r, c]

  // columns that rows [i0, i1) leave out, cut to [j0, j1); empty at j1 if there are none
  KDK_INLINE void left_out(int64_t i0, int64_t i1, int64_t j0, int64_t j1, int64_t& first, int64_t& last) const {
    first = last = j1;
    const int64_t from = std::max(i0 + diagonal, j0), to = std::min(i1 + diagonal, j1);
    if (from < to) first = from, last = to;
  }
};

// rows [R] of k and l at one column offset; columns [5] at stride kTileColumns
template <class T, int W, int R, bool kColumns>
KDK_INLINE void add_lanes(const T* const* k, const T* const* l, int64_t j, Lanes<W> (&row)[R][kMoments],
                          double* columns) {
  Lanes<W> column[kMoments];
  if (kColumns) {
    for (int m = 0; m < kMoments; ++m) column[m].load(columns + m * kTileColumns + j);
  }
  for (int i = 0; i < R; ++i) {
    Lanes<W> term[kMoments];
    term[0].load(k[i] + j);
    term[1].load(l[i] + j);
    term[2].set_product(term[0], term[0]);
    term[3].set_product(term[0], term[1]);
    term[4].set_product(term[1], term[1]);
    for (int m = 0; m < kMoments; ++m) {
      row[i][m].add(term[m]);
      // row after row, so the order does not depend on R
      if (kColumns) column[m].add(term[m]);
    }
  }
  if (kColumns) {
    for (int m = 0; m < kMoments; ++m) column[m].store(columns + m * kTileColumns + j);
  }
}

// R rows of one tile: whole lanes straight from the panel, the left-out diagonal and the ragged end through a copy
// in which the entries that do not count are zero
template <class T, int W, int R, bool kColumns>
KDK_INLINE void add_rows(const Panel<T>& panel, int64_t i0, int64_t j0, int64_t j1, double* rows, double* columns) {
  const T *k[R], *l[R];
  for (int i = 0; i < R; ++i) {
    k[i] = panel.k + (i0 + i) * panel.ldk + j0;
    l[i] = panel.l + (i0 + i) * panel.ldl + j0;
  }
  Lanes<W> row[R][kMoments] = {};
  const int64_t width = j1 - j0, whole = width / kLanes * kLanes;
  int64_t first, last;
  panel.left_out(i0, i0 + R, j0, j1, first, last);
  const int64_t skip0 = std::min((first - j0) / kLanes * kLanes, whole);
  const int64_t skip1 = first < last ? std::min((last - j0 + kLanes - 1) / kLanes * kLanes, whole) : skip0;

  for (int64_t j = 0; j < skip0; j += kLanes) add_lanes<T, W, R, kColumns>(k, l, j, row, columns);
  for (int64_t j = skip0; j < width; j += kLanes) {
    if (j == skip1) {
      for (; j < whole; j += kLanes) add_lanes<T, W, R, kColumns>(k, l, j, row, columns);
      if (j >= width) break;
    }
    T copy[2][R][kLanes] = {};
    const T *ck[R], *cl[R];
    for (int i = 0; i < R; ++i) {
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, width - j); ++lane) {
        const bool counts = j0 + j + lane != i0 + i + panel.diagonal;
        copy[0][i][lane] = counts ? k[i][j + lane] : T(0);
        copy[1][i][lane] = counts ? l[i][j + lane] : T(0);
      }
      ck[i] = copy[0][i], cl[i] = copy[1][i];
    }
    add_lanes<T, W, R, kColumns>(ck, cl, 0, row, kColumns ? columns + j : nullptr);
  }
  for (int i = 0; i < R; ++i) {
    for (int m = 0; m < kMoments; ++m) rows[m * panel.r + i0 + i] = row[i][m].sum();
  }
}

// rows [5, r] of this column tile, columns [5, kTileColumns] of this tile alone, or null.
// R rows share one read and write of the column sums, as many as the registers hold
template <class T, int W, int R>
KDK_INLINE void add_tile(const Panel<T>& panel, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* rows,
                         double* columns) {
  int64_t i = i0;
  if (columns) {
    for (; i + R <= i1; i += R) add_rows<T, W, R, true>(panel, i, j0, j1, rows, columns);
    for (; i < i1; ++i) add_rows<T, W, 1, true>(panel, i, j0, j1, rows, columns);
  } else {
    for (; i + R <= i1; i += R) add_rows<T, W, R, false>(panel, i, j0, j1, rows, columns);
    for (; i < i1; ++i) add_rows<T, W, 1, false>(panel, i, j0, j1, rows, columns);
  }
}

// plain functions, because the target attribute does not reach through a template. (W, R) measured on [512, 2048]
#define KDK_TILE(NAME, TARGET, T, W, R)                                                                       \
  TARGET void NAME(const Panel<T>& panel, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* rows,       \
                   double* columns) {                                                                         \
    add_tile<T, W, R>(panel, i0, i1, j0, j1, rows, columns);                                                  \
  }
KDK_TILE(tile_baseline, , float, 2, 2)
KDK_TILE(tile_baseline, , double, 2, 2)
#if KDK_X86
KDK_TILE(tile_avx2, KDK_AVX2, float, 4, 4)
KDK_TILE(tile_avx2, KDK_AVX2, double, 4, 4)
KDK_TILE(tile_avx512, KDK_AVX512, float, 8, 4)
KDK_TILE(tile_avx512, KDK_AVX512, double, 8, 4)
#endif
#undef KDK_TILE

template <class T>
void tile(const Panel<T>& panel, int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* rows, double* columns) {
#if KDK_X86
  static const Isa isa = detect_isa();
  if (isa == Isa::kAvx512) return tile_avx512(panel, i0, i1, j0, j1, rows, columns);
  if (isa == Isa::kAvx2) return tile_avx2(panel, i0, i1, j0, j1, rows, columns);
#endif
  tile_baseline(panel, i0, i1, j0, j1, rows, columns);
}

// rows [5, r] and, unless null, columns [5, c]
template <class T>
void moments(const Panel<T>& panel, double* rows, double* columns) {
  const int64_t r = panel.r, c = panel.c;
  const int64_t bands = (r + kTileRows - 1) / kTileRows, strips = (c + kTileColumns - 1) / kTileColumns;
  std::fill(rows, rows + kMoments * r, 0.0);
  if (columns) std::fill(columns, columns + kMoments * c, 0.0);
  if (bands * strips == 0) return;

  std::vector<double> row_parts(strips * kMoments * r);                                   // [strips, 5, r]
  std::vector<double> column_parts(columns ? bands * strips * kMoments * kTileColumns : 0); // [bands, strips, 5, 512]
  torch::stable::parallel_for(0, bands * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t band = t / strips, strip = t % strips;
      const int64_t i0 = band * kTileRows, i1 = std::min(r, i0 + kTileRows);
      const int64_t j0 = strip * kTileColumns, j1 = std::min(c, j0 + kTileColumns);
      double* part = columns ? column_parts.data() + t * kMoments * kTileColumns : nullptr;
      tile(panel, i0, i1, j0, j1, row_parts.data() + strip * kMoments * r, part);
    }
  });

  for (int64_t strip = 0; strip < strips; ++strip) {
    const double* part = row_parts.data() + strip * kMoments * r;
    for (int64_t i = 0; i < kMoments * r; ++i) rows[i] += part[i];
  }
  if (!columns) return;
  torch::stable::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t j0 = strip * kTileColumns, width = std::min(c - j0, kTileColumns);
      for (int64_t band = 0; band < bands; ++band) {
        const double* part = column_parts.data() + (band * strips + strip) * kMoments * kTileColumns;
        for (int64_t m = 0; m < kMoments; ++m) {
          for (int64_t j = 0; j < width; ++j) columns[m * c + j0 + j] += part[m * kTileColumns + j];
        }
      }
    }
  });
}

template <class T>
void run(const Tensor& k, const Tensor& l, int64_t diagonal, Tensor& rows, Tensor& columns, bool symmetric) {
  const int64_t r = k.size(0), c = k.size(1);
  // no entry has j - i outside (-r, c), so the cut keeps the meaning and i + diagonal cannot overflow
  const Panel<T> panel{static_cast<const T*>(k.const_data_ptr()), static_cast<const T*>(l.const_data_ptr()),
                       k.stride(0), l.stride(0), r, c, std::clamp(diagonal, -r, c)};
  moments(panel, static_cast<double*>(rows.mutable_data_ptr()),
          symmetric ? static_cast<double*>(columns.mutable_data_ptr()) : nullptr);
}

void check_panel(const Tensor& panel, const char* name) {
  KDK_CHECK(panel.is_cpu(), "panel_moments: ", name, " is not a CPU tensor: this op runs on the CPU only");
  KDK_CHECK(panel.dim() == 2, "panel_moments: ", name, " has ", panel.dim(), " dimensions: pass a panel [r, c]");
  const auto dtype = panel.scalar_type();
  KDK_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "panel_moments: ", name, " is ",
            torch::headeronly::toString(dtype), ": pass float32 or float64");
  // a single column has any stride, and is contiguous all the same
  KDK_CHECK(panel.size(1) <= 1 || panel.stride(1) == 1, "panel_moments: ", name, " has column stride ", panel.stride(1),
            ": pass ", name, ".contiguous(), rows must be dense");
}

std::tuple<Tensor, Tensor> panel_moments(Tensor k, Tensor l, int64_t diagonal, bool symmetric) {
  check_panel(k, "k");
  check_panel(l, "l");
  KDK_CHECK(k.scalar_type() == l.scalar_type(), "panel_moments: k is ", torch::headeronly::toString(k.scalar_type()),
            " and l is ", torch::headeronly::toString(l.scalar_type()), ": cast them to one dtype");
  KDK_CHECK(k.size(0) == l.size(0) && k.size(1) == l.size(1), "panel_moments: k is [", k.size(0), ", ", k.size(1),
            "] and l is [", l.size(0), ", ", l.size(1), "]: pass panels of the same rows and columns");

  const int64_t row_shape[2] = {kMoments, k.size(0)}, column_shape[2] = {kMoments, symmetric ? k.size(1) : 0};
  Tensor rows = torch::stable::new_empty(k, {row_shape, 2}, ScalarType::Double);
  Tensor columns = torch::stable::new_empty(k, {column_shape, 2}, ScalarType::Double);
  if (k.scalar_type() == ScalarType::Float) {
    run<float>(k, l, diagonal, rows, columns, symmetric);
  } else {
    run<double>(k, l, diagonal, rows, columns, symmetric);
  }
  return {rows, columns};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("panel_moments(Tensor k, Tensor l, int diagonal, bool symmetric) -> (Tensor rows, Tensor columns)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("panel_moments", TORCH_BOX(&kdkernels::panel_moments)); }
