// Gradients of weights: products over the rows of all steps of a chunk at once.
#pragma once

#include "vector_latent_update/block.h"

namespace vector_latent_update {

// out (+)= sum over pieces of left^T right; a piece is what lies side by side on both sides.
struct WeightProduct {
  Panels left, right;
  int64_t pieces, units, right_first, right_step;  // of a piece: units, and where it begins on the right
  float* out;
  int64_t out_row;
};

struct StoreOrAdd {
  float* out;
  int64_t width;
  bool add;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        float* at = out + (row + r) * width + col + c * kLanes;
        _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sums[r][c]) : sums[r][c]);
      }
    }
  }
};

// Units that are summed at once, and panels of the left side that stay in the second-level cache while the panels of
// the right side pass: 256 KB.
constexpr int64_t kDepth = 1024, kLeftPanels = 2;

// Rows of `out` that belong to the panels `first` .. `end` of the left side, `units` of which are summed.
template <class E>
void multiply_panels(const WeightProduct& p, int64_t first, int64_t end, int64_t hidden, int64_t left_unit,
                     int64_t right_unit, int64_t units, bool add) {
  const StoreOrAdd out{p.out, p.out_row, add};
  for (int64_t col = 0; col < hidden; col += kPanel) {
    for (int64_t panel = first; panel < end; ++panel) {
      for (int64_t row = 0; row < kPanel;) {
        const int64_t count = tile_rows(row, kPanel);
        const Left left{p.left.at(panel * kPanel + row, left_unit), 1, kPanel};
        const uint32_t* right = p.right.at(col, right_unit);
        if (count == 12) {
          tile<E, 12, 2>(left, right, units, panel * kPanel + row, col, out);
        } else {
          tile<E, 10, 2>(left, right, units, panel * kPanel + row, col, out);
        }
        row += count;
      }
    }
  }
}

template <class E>
void multiply_pieces(const WeightProduct& p, int64_t first, int64_t hidden, bool add) {
  const int64_t end = std::min(first + kLeftPanels, hidden / kPanel);
  for (int64_t piece = 0; piece < p.pieces; ++piece) {
    for (int64_t unit = 0; unit < p.units; unit += kDepth) {
      multiply_panels<E>(p, first, end, hidden, piece * p.units + unit, p.right_first + piece * p.right_step + unit,
                         std::min(kDepth, p.units - unit), add);
      add = true;
    }
  }
}

// Gradients of one network, row by row.
struct Gradients {
  float *in, *in_bias, *out, *out_bias, *gain, *shift;
};

// Longest first, so that the threads end together.
template <class E>
std::vector<WeightProduct> weight_products(const Counts& counts, const Saved<E>& saved, const Operands<E>& o,
                                           const Gradients& z, const Gradients& y) {
  const int64_t h = counts.hidden, slot = saved.y.rows / E::kUnit, rounds = counts.grad_rounds;
  const int64_t steps = counts.grad_steps() * slot, every = rounds * slot, round = counts.steps * slot;
  return {{o.hidden_z.panels, saved.z.panels, 1, steps, 0, 0, z.in + 2 * h, 3 * h},
          {o.out_z.panels, saved.act_z.panels, 1, steps, 0, 0, z.out, h},
          {o.round.panels, saved.y.panels, 1, every, 0, 0, z.in + h, 3 * h},
          {o.hidden_y.panels, saved.y.panels, 1, every, 0, 0, y.in, 2 * h},
          {o.hidden_y.panels, saved.z.panels, rounds, slot, round, round, y.in + h, 2 * h},
          {o.out_y.panels, saved.act_y.panels, 1, every, 0, 0, y.out, h},
          {o.total.panels, o.x.panels, 1, slot, 0, 0, z.in, 3 * h}};
}

}  // namespace vector_latent_update
