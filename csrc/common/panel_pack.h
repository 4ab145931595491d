// Weights, stored as float32 in any order, in the forms that products read.
#pragma once

#include "common/panel_product.h"
#include "common/parallel.h"

namespace panel {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A weight as float32: element (i, j) is data[i * row + j * col].
struct Matrix {
  const float* data;
  int64_t rows, cols, row, col;

  Matrix transposed() const { return {data, cols, rows, col, row}; }
};

// SwiGLU's weights have all gate rows before all up rows. Where both are needed at once, 16 of each take turns.
inline int64_t in_turns(int64_t block, int64_t inner) {
  return block % 2 == 0 ? block / 2 * kLanes : inner + block / 2 * kLanes;
}

AVX512 inline __m512 strided(const float* place, int64_t step, int64_t count) {
  const __mmask16 mask = lanes(count);
  if (step == 1) return _mm512_maskz_loadu_ps(mask, place);
  const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_mullo_epi32(order, _mm512_set1_epi32(static_cast<int>(step)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, place, 4);
}

// Block (i, j) of 2 x 16 of the matrix, below and right of which it is zero.
template <class E>
AVX512 void pack_block(const Matrix& m, int64_t i, int64_t j, uint32_t* place) {
  const float* from = m.data + i * m.row + j * m.col;
  const __m512 none = _mm512_setzero_ps();
  const __m512 a = i < m.rows ? strided(from, m.col, m.cols - j) : none;
  const __m512 b = i + 1 < m.rows ? strided(from + m.row, m.col, m.cols - j) : none;
  E::store_rows(place, kPanel, a, b);
}

// The right side of a product: rows are summed. `inner` > 0 puts its columns (or its rows) of SwiGLU in turns.
template <class E>
void pack_panels(const Matrix& m, const Panels& out, int64_t cols_inner = 0, int64_t rows_inner = 0) {
  const int64_t panels = ceil_div(m.cols, kPanel), rows = out.units * E::kUnit;
  trm_fast::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin * 2; block < end * 2; ++block) {
      const int64_t j = cols_inner > 0 ? in_turns(block, cols_inner) : block * kLanes;
      for (int64_t i = 0; i < rows; i += 2) {
        const int64_t from = rows_inner > 0 ? in_turns(i / kLanes, rows_inner) + i % kLanes : i;
        uint32_t* place = out.at(block * kLanes, i / E::kUnit);
        if (j < m.cols) {
          pack_block<E>(m, from, j, place);
        } else {
          pack_block<E>({m.data, 0, 0, 0, 0}, 0, 0, place);
        }
      }
    }
  });
}

// One row of the left side; values beyond its end are zero.
template <class E>
AVX512 void pack_row(const Matrix& m, int64_t i, uint32_t* row, int64_t units) {
  auto* values = reinterpret_cast<typename E::Stored*>(row);
  for (int64_t j = 0; j < units * E::kUnit; j += kLanes) {
    const __m512 x = i < m.rows ? strided(m.data + i * m.row + j * m.col, m.col, m.cols - j) : _mm512_setzero_ps();
    E::store(values + j, x, lanes(units * E::kUnit - j));
  }
}

// The left side of a product: columns are summed. `inner` > 0 gives each tile its gate rows before its up rows.
template <class E>
void pack_rows(const Matrix& m, int64_t rows, const Left& out, int64_t inner = 0) {
  auto* words = const_cast<uint32_t*>(out.words);
  for (int64_t row = 0; row < rows;) {
    const int64_t count = inner > 0 ? tile_rows(row, rows, 4) : rows, half = count / 2;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t from = inner == 0 ? r : r < half ? row / 2 + r : inner + row / 2 + r - half;
      pack_row<E>(m, from, words + (row + r) * out.row, out.row);
    }
    row += count;
  }
}

}  // namespace panel
