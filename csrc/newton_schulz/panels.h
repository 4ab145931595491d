// Matrices in bfloat16 as the products of cpu.cpp read them, and blocks of 16 x 16 on their way in and out.
//
// A panel holds 16 columns of a matrix. Its words are [pair of rows][column], and a word holds two rows in its lower
// and upper half, as the instruction for dot products of pairs wants them. So a block of 16 x 16 is 128 words in a row.
#pragma once

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 blames its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "common/dtypes.h"
#include "common/transpose.h"

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c")))

namespace newton_schulz {

using namespace trm_fast;

constexpr int64_t kSide = 16;  // of a block: the lanes of a register
constexpr int64_t kBlockWords = kSide * kSide / 2;

struct Panels {
  uint32_t* words;
  int64_t count;   // of panels
  int64_t blocks;  // of 16 rows in each panel

  uint32_t* at(int64_t panel, int64_t block) const { return words + (panel * blocks + block) * kBlockWords; }
  int64_t panel_words() const { return blocks * kBlockWords; }
};

AVX512_BF16 inline __m512i two_rows(__m512 lower, __m512 upper) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(upper, lower));
}

AVX512_BF16 inline __m512 even_row(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
AVX512_BF16 inline __m512 odd_row(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Stores a block, given as rows.
AVX512_BF16 inline void store_block(uint32_t* out, const __m512 (&rows)[kSide]) {
  const __m512i halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                          21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 8
  for (int p = 0; p < kSide / 2; ++p) {
    const __m512i words = _mm512_permutexvar_epi16(halves, two_rows(rows[2 * p], rows[2 * p + 1]));
    _mm512_store_si512(out + p * kSide, words);
  }
}

// Stores the transposed block.
AVX512_BF16 inline void store_mirrored(uint32_t* out, const __m512 (&rows)[kSide]) {
  __m512i words[kSide / 2];
#pragma GCC unroll 8
  for (int r = 0; r < kSide / 2; ++r) words[r] = two_rows(rows[r], rows[r + kSide / 2]);
  transpose(words);
#pragma GCC unroll 8
  for (int p = 0; p < kSide / 2; ++p) _mm512_store_si512(out + p * kSide, words[p]);
}

// Up to 16 neighbours of a row of the caller's matrix as float32; those without a bit in the mask are zero.
AVX512_BF16 inline __m512 load_row(const char* place, int64_t dtype, __mmask16 mask) {
  if (dtype == kFloat32) return _mm512_maskz_loadu_ps(mask, place);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, place);
  if (dtype == kFloat16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

AVX512_BF16 inline void store_row(char* place, int64_t dtype, __mmask16 mask, __m512 row) {
  if (dtype == kFloat32) {
    _mm512_mask_storeu_ps(place, mask, row);
  } else if (dtype == kFloat16) {
    _mm256_mask_storeu_epi16(place, mask, _mm512_cvtps_ph(row, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    _mm256_mask_storeu_epi16(place, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(row)));
  }
}

}  // namespace newton_schulz
