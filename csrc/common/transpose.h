// Transposes squares of words that stand in registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace trm_fast {

constexpr int kSquare = 16;  // the lanes of a register

// Lanes for one stage: lane c of the lower row takes lane c, or lane c - step of the upper row.
struct Stage {
  alignas(64) int32_t lower[kSquare], upper[kSquare];

  constexpr explicit Stage(int step) : lower(), upper() {
    for (int c = 0; c < kSquare; ++c) {
      lower[c] = c & step ? kSquare + c - step : c;
      upper[c] = c & step ? kSquare + c : c + step;
    }
  }
};
constexpr Stage kStages[] = {Stage(1), Stage(2), Stage(4), Stage(8)};

// Squares of kRows x kRows words, which stand side by side in kRows registers.
template <int kRows>
__attribute__((target("avx512f"))) inline void transpose(__m512i (&rows)[kRows]) {
#pragma GCC unroll 4
  for (int s = 0; (1 << s) < kRows; ++s) {
    const __m512i lower = _mm512_load_si512(kStages[s].lower), upper = _mm512_load_si512(kStages[s].upper);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if (r & (1 << s)) continue;
      const __m512i a = rows[r], b = rows[r + (1 << s)];
      rows[r] = _mm512_permutex2var_epi32(a, lower, b);
      rows[r + (1 << s)] = _mm512_permutex2var_epi32(a, upper, b);
    }
  }
}

}  // namespace trm_fast
