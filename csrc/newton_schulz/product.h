// Products of matrices in panels: sums in float32, and an end that adds, rounds once and stores.
#pragma once

#include <algorithm>

#include "newton_schulz/panels.h"

namespace newton_schulz {

// 8 rows x 3 panels are 24 sums in registers, enough to hide the latency of the multiply-add; 3 loads of words and 8
// broadcasts serve 24 multiply-adds.
constexpr int64_t kTileRows = 8;
constexpr int kTilePanels = 3;
// Three panels of 256 rows are 24 KB, half of the first-level cache.
constexpr int64_t kDepthBlocks = 16;

// The caller's matrix, where the last product ends.
struct Matrix {
  char* data;
  int64_t rows, cols, stride_bytes, dtype, element_bytes;

  char* at(int64_t row, int64_t col) const { return data + row * stride_bytes + col * element_bytes; }
};

AVX512_BF16 inline __mmask16 lanes(int64_t size) {
  return size >= kSide ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << size) - 1);
}

// gain * left^T right + weight * source, block by block. `left` is read by columns: its panels are rows of the product.
struct Product {
  Panels left, right;
  bool lower;  // the product is symmetric: only blocks on and below the diagonal are computed
  float gain;
  const Panels* source;  // or null
  float weight;
  const Panels* direct;    // where the blocks go
  const Panels* mirrored;  // where their transposes go
  const Matrix* matrix;    // where they go instead, transposed if the matrix is tall; or null
};

template <int kPanels>
AVX512_BF16 inline void multiply_tile(float* __restrict__ sums, int64_t sums_stride, const uint32_t* __restrict__ left,
                                      const uint32_t* __restrict__ right, int64_t right_stride, int64_t pairs,
                                      bool first) {
  __m512 tile[kTileRows][kPanels];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      tile[r][p] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + p * sums_stride + r * kSide);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh columns[kPanels];
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) {
      columns[p] = reinterpret_cast<__m512bh>(_mm512_load_si512(right + p * right_stride + pair * kSide));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(left[pair * kSide + r])));
#pragma GCC unroll 3
      for (int p = 0; p < kPanels; ++p) tile[r][p] = _mm512_dpbf16_ps(tile[r][p], row, columns[p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int p = 0; p < kPanels; ++p) _mm512_store_ps(sums + p * sums_stride + r * kSide, tile[r][p]);
  }
}

using MultiplyTile = void (*)(float*, int64_t, const uint32_t*, const uint32_t*, int64_t, int64_t, bool);
constexpr MultiplyTile kMultiplyTile[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>};

// Sums of all rows from block `top` on, for the panels from `begin` to `end`; laid out [panel][row][16].
inline void multiply_panels(const Product& p, float* sums, int64_t top, int64_t begin, int64_t end) {
  const int64_t rows = (p.left.count - top) * kSide;
  for (int64_t depth = 0; depth < p.right.blocks; depth += kDepthBlocks) {
    const int64_t pairs = std::min(kDepthBlocks, p.right.blocks - depth) * kSide / 2;
    for (int64_t i = top; i < p.left.count; ++i) {
      const int64_t width = std::min(end, p.lower ? i + 1 : end) - begin;
      for (int64_t r = 0; r < kSide; r += kTileRows) {
        kMultiplyTile[width - 1](sums + ((i - top) * kSide + r) * kSide, rows * kSide, p.left.at(i, depth) + r,
                                 p.right.at(begin, depth), p.right.panel_words(), pairs, depth == 0);
      }
    }
  }
}

AVX512_BF16 inline void store_in_matrix(const Matrix& matrix, int64_t i, int64_t j, __m512 (&rows)[kSide]) {
  int64_t row = i * kSide, col = j * kSide;
  if (matrix.rows > matrix.cols) {
    transpose(reinterpret_cast<__m512i(&)[kSide]>(rows));
    std::swap(row, col);
  }
  const __mmask16 mask = lanes(matrix.cols - col);
  const int64_t count = std::min(kSide, matrix.rows - row);
  for (int64_t r = 0; r < count; ++r) store_row(matrix.at(row + r, col), matrix.dtype, mask, rows[r]);
}

AVX512_BF16 inline void finish_block(const Product& p, const float* sums, int64_t i, int64_t j) {
  __m512 rows[kSide];
  const __m512 gain = _mm512_set1_ps(p.gain), weight = _mm512_set1_ps(p.weight);
#pragma GCC unroll 16
  for (int r = 0; r < kSide; ++r) rows[r] = _mm512_mul_ps(gain, _mm512_load_ps(sums + r * kSide));
  if (p.source != nullptr) {
    const uint32_t* source = p.source->at(j, i);
#pragma GCC unroll 8
    for (int r = 0; r < kSide; r += 2) {
      const __m512i words = _mm512_load_si512(source + r / 2 * kSide);
      rows[r] = _mm512_fmadd_ps(weight, even_row(words), rows[r]);
      rows[r + 1] = _mm512_fmadd_ps(weight, odd_row(words), rows[r + 1]);
    }
  }
  if (p.matrix != nullptr) return store_in_matrix(*p.matrix, i, j, rows);
  store_block(p.direct->at(j, i), rows);
  if (!p.lower || i != j) store_mirrored(p.mirrored->at(i, j), rows);
}

// All blocks of the panels from `begin` to `end`, at most kTilePanels. The panels of `right` may be overwritten,
// because all sums are taken first.
inline void compute_panels(const Product& p, float* sums, int64_t begin, int64_t end) {
  const int64_t top = p.lower ? begin : 0, rows = p.left.count - top;
  multiply_panels(p, sums, top, begin, end);
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t i = p.lower ? j : 0; i < p.left.count; ++i) {
      finish_block(p, sums + ((j - begin) * rows + i - top) * kSide * kSide, i, j);
    }
  }
}

}  // namespace newton_schulz
