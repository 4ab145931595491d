// The two networks in the forms that products read. One network is out gelu(in [..] + in_bias) + out_bias, then a norm.
#pragma once

#include <atomic>
#include <vector>

#include "common/arena.h"
#include "common/panel_product.h"
#include "common/transpose.h"

namespace vector_latent_update {

using namespace panel;

// Weights as float32, row by row; `in` has `parts` x hidden columns.
struct Given {
  int64_t parts;
  const float *in, *in_bias, *out, *out_bias, *gain, *shift;
};

struct Net {
  Panels in, out;            // transposed: features that go in are summed
  Panels in_back, out_back;  // features that come out are summed
  const float *in_bias, *out_bias, *gain, *shift;
};

// One panel of 32 columns; `transposed` are those of the transpose of a weight.
struct Packing {
  const float* from;
  int64_t row;  // from one row of the weight to the next
  Panels to;
  int64_t col;
  bool transposed;
};

// Rows col .. col + 31 of the weight become columns, 16 x 16 at a time.
template <class E>
AVX512 void pack_transposed(const Packing& p) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    for (int64_t i = 0; i < p.to.units * E::kUnit; i += kLanes) {
      __m512i square[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) square[j] = _mm512_loadu_si512(p.from + (p.col + half + j) * p.row + i);
      trm_fast::transpose<kLanes>(square);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kLanes; j += 2) {
        E::store_rows(p.to.at(p.col + half, (i + j) / E::kUnit), kPanel, _mm512_castsi512_ps(square[j]),
                      _mm512_castsi512_ps(square[j + 1]));
      }
    }
  }
}

template <class E>
AVX512 void pack_straight(const Packing& p) {
  for (int64_t i = 0; i < p.to.units * E::kUnit; i += 2) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const float* place = p.from + i * p.row + p.col + half;
      E::store_rows(p.to.at(p.col + half, i / E::kUnit), kPanel, _mm512_loadu_ps(place),
                    _mm512_loadu_ps(place + p.row));
    }
  }
}

template <class E>
Panels take_panels(int64_t rows, int64_t cols, Arena& arena) {
  return {arena.take<uint32_t>(rows / E::kUnit * cols), rows / E::kUnit};
}

// Takes the memory of one network and lists what fills it. Not every call needs both directions.
template <class E>
Net lay_out_net(const Given& given, int64_t hidden, bool forward, bool backward, Arena& arena,
                std::vector<Packing>& packings) {
  Net net{{}, {}, {}, {}, given.in_bias, given.out_bias, given.gain, given.shift};
  const int64_t wide = given.parts * hidden;
  const auto pack = [&](const float* from, int64_t rows, int64_t cols, bool transposed) {
    const int64_t summed = transposed ? cols : rows, made = transposed ? rows : cols;
    const Panels to = take_panels<E>(summed, made, arena);
    for (int64_t col = 0; col < made; col += kPanel) packings.push_back({from, cols, to, col, transposed});
    return to;
  };
  if (forward) {
    net.in = pack(given.in, hidden, wide, true);
    net.out = pack(given.out, hidden, hidden, true);
  }
  if (backward) {
    net.in_back = pack(given.in, hidden, wide, false);
    net.out_back = pack(given.out, hidden, hidden, false);
  }
  return net;
}

}  // namespace vector_latent_update
