// Products of a left matrix, broadcast unit by unit, with a right one in panels; the sums stay in registers until the
// caller's `Out` has used them.
#pragma once

#include <algorithm>

#include "common/elements.h"

namespace panel {

// 12 rows x 32 columns are 24 sums in registers: enough to hide the latency of the multiply-add, and 12 broadcasts and
// 2 loads serve 24 of them. A panel of 512 values along the summed side is 32 KB in bfloat16, which the first-level
// cache keeps for all rows.
constexpr int kTileRows = 12;
constexpr int64_t kPanel = 32;  // columns, and words from one unit of a panel to the next

// The word of row m and unit u is words[m * row + u * unit].
struct Left {
  const uint32_t* words;
  int64_t row, unit;
};

// [panel][unit][kPanel] words.
struct Panels {
  uint32_t* words;
  int64_t units;

  uint32_t* at(int64_t col, int64_t unit = 0) const {
    return words + (col / kPanel * units + unit) * kPanel + col % kPanel;
  }
};

// Panels, read by columns: their columns are the rows of the product.
inline Left by_columns(const Panels& panels, int64_t panel) { return {panels.at(panel * kPanel), 1, kPanel}; }

template <class E, int R, int C>
AVX512 inline void multiply(__m512 (&sums)[R][C], const Left& left, const uint32_t* right, int64_t units) {
  const int64_t row = left.row;
  const uint32_t* triples[(R + 2) / 3];  // few enough pointers to stay in registers
#pragma GCC unroll 4
  for (int t = 0; t < (R + 2) / 3; ++t) triples[t] = left.words + 3 * t * row;
  for (int64_t u = 0; u < units; ++u) {
    __m512i columns[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) columns[c] = _mm512_loadu_si512(right + c * kLanes);
    right += kPanel;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512i word = _mm512_set1_epi32(static_cast<int>(triples[r / 3][r % 3 * row]));
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sums[r][c] = E::dot(sums[r][c], word, columns[c]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < (R + 2) / 3; ++t) triples[t] += left.unit;
  }
}

template <class E, int R, int C, class Out>
AVX512 void tile(const Left& left, const uint32_t* right, int64_t units, int64_t row, int64_t col, const Out& out) {
  __m512 sums[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  multiply<E, R, C>(sums, left, right, units);
  out(row, col, sums);
}

// Rows of the tile that begins at `row`: a multiple of `step`, and hardly different from tile to tile.
inline int64_t tile_rows(int64_t row, int64_t rows, int64_t step = 2) {
  const int64_t left = rows - row, tiles = (left + kTileRows - 1) / kTileRows;
  return (left + step * tiles - 1) / (step * tiles) * step;
}

// One panel of columns: rows x (C * 16) sums, tile by tile; `rows` and the rows of a tile are multiples of `step`.
template <class E, int C, class Out>
void panel_product(const Left& left, int64_t rows, const uint32_t* right, int64_t units, int64_t col, const Out& out,
                   int64_t step = 2) {
  for (int64_t row = 0; row < rows;) {
    const Left here{left.words + row * left.row, left.row, left.unit};
    const int64_t count = tile_rows(row, rows, step);
    switch (count) {
      case 2:
        tile<E, 2, C>(here, right, units, row, col, out);
        break;
      case 4:
        tile<E, 4, C>(here, right, units, row, col, out);
        break;
      case 6:
        tile<E, 6, C>(here, right, units, row, col, out);
        break;
      case 8:
        tile<E, 8, C>(here, right, units, row, col, out);
        break;
      case 10:
        tile<E, 10, C>(here, right, units, row, col, out);
        break;
      default:
        tile<E, 12, C>(here, right, units, row, col, out);
        break;
    }
    row += count;
  }
}

// All of left x right, where `cols` fills whole panels.
template <class E, class Out>
void whole_product(const Left& left, int64_t rows, const Panels& right, int64_t cols, const Out& out) {
  for (int64_t col = 0; col < cols; col += kPanel) {
    panel_product<E, 2>(left, rows, right.at(col), right.units, col, out);
  }
}

// All of left x right for any number of columns. A last panel of up to 16 columns takes half of the work.
template <class E, class Out>
void product(const Left& left, int64_t rows, const Panels& right, int64_t cols, const Out& out) {
  for (int64_t col = 0; col < cols; col += kPanel) {
    if (cols - col > kLanes) {
      panel_product<E, 2>(left, rows, right.at(col), right.units, col, out);
    } else {
      panel_product<E, 1>(left, rows, right.at(col), right.units, col, out);
    }
  }
}

}  // namespace panel
