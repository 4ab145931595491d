// Norms and SwiGLU over the features of one sample, forward and backward. Rows are tokens; where their number is odd a
// row of zeros follows, so that they come in pairs.
#pragma once

#include <cmath>

#include "common/arena.h"
#include "common/panel_pack.h"

namespace latent_update {

using namespace panel;

struct Sizes {
  int64_t length, padded;                  // tokens, and the next even number
  int64_t width, inner, mix_inner, heads;  // mix_inner of the token mixer; 0 for attention
  float eps;

  bool attention() const { return mix_inner == 0; }
  int64_t head_dim() const { return width / heads; }
  int64_t token_panels() const { return ceil_div(length, kPanel); }
};

struct MlpWeights {
  Panels gate_up, down;            // columns of gate_up in turns
  Panels down_back, gate_up_back;  // of the backward pass; rows of gate_up_back in turns
};

// Products of the whole batch that give the gradients of weights: both sides have the tokens of all samples as rows.
struct MlpOperands {
  Panels in, act, d_out, d_gate_up;
};

// silu(gate) * up, and what a gradient of it becomes.
template <class E>
AVX512 inline __m512 swiglu(__m512 gate, __m512 up) {
  return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid<E>(gate)), up);
}

template <class E>
AVX512 inline void swiglu_backward(__m512 gate, __m512 up, __m512 d_act, __m512& act, __m512& d_gate, __m512& d_up) {
  const __m512 s = sigmoid<E>(gate), silu = _mm512_mul_ps(gate, s);
  act = _mm512_mul_ps(silu, up);
  d_up = _mm512_mul_ps(silu, d_act);
  // d silu / d gate = s + silu (1 - s)
  const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
  d_gate = _mm512_mul_ps(_mm512_mul_ps(d_act, up), slope);
}

template <class E>
struct StoreAct {
  typename E::Stored* act;
  int64_t inner;
  typename E::Stored* gate_up;  // or null

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
    static_assert(C == 2, "a gate and an up column");
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if (act != nullptr) E::store(act + (row + r) * inner + col / 2, swiglu<E>(sums[r][0], sums[r][C - 1]));
      if (gate_up == nullptr) continue;
      E::store(gate_up + (row + r) * 2 * inner + col, sums[r][0]);
      E::store(gate_up + (row + r) * 2 * inner + col + kLanes, sums[r][C - 1]);
    }
  }
};

// out = sums + residual, in float32.
template <class Residual>
struct AddResidual {
  float* out;
  const typename Residual::Stored* residual;
  int64_t width;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const int64_t i = (row + r) * width + col + c * kLanes;
        _mm512_storeu_ps(out + i, _mm512_add_ps(sums[r][c], Residual::load(residual + i)));
      }
    }
  }
};

template <class E>
struct StoreRows {
  typename E::Stored* out;
  int64_t width;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) E::store(out + (row + r) * width + col + c * kLanes, sums[r][c]);
    }
  }
};

// The gradient of the activation becomes those of gate and up, and the activation is computed once more.
template <class E>
struct BackThroughAct {
  const typename E::Stored* gate_up;
  typename E::Stored* d_gate_up;
  Panels act, d_gate_up_panels;  // from the first row of this sample on
  int64_t inner;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 6
    for (int r = 0; r < R; r += 2) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const int64_t at = 2 * (col + c * kLanes), unit = (row + r) / E::kUnit;
        __m512 a[2], d_gate[2], d_up[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t place = (row + r + i) * 2 * inner + at;
          swiglu_backward<E>(E::load(gate_up + place), E::load(gate_up + place + kLanes), sums[r + i][c], a[i],
                             d_gate[i], d_up[i]);
          E::store(d_gate_up + place, d_gate[i]);
          E::store(d_gate_up + place + kLanes, d_up[i]);
        }
        E::store_rows(act.at(col + c * kLanes, unit), kPanel, a[0], a[1]);
        E::store_rows(d_gate_up_panels.at(at, unit), kPanel, d_gate[0], d_gate[1]);
        E::store_rows(d_gate_up_panels.at(at + kLanes, unit), kPanel, d_up[0], d_up[1]);
      }
    }
  }
};

template <class E>
Left rows_of(const typename E::Stored* values, int64_t width) {
  return {reinterpret_cast<const uint32_t*>(values), width / E::kUnit, 1};
}

inline Panels from_unit(const Panels& panels, int64_t unit) { return {panels.words + unit * kPanel, panels.units}; }

template <class E>
AVX512 void to_panels(const typename E::Stored* values, int64_t rows, int64_t width, const Panels& out) {
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t col = 0; col < width; col += kLanes) {
      const auto* place = values + row * width + col;
      E::store_rows(out.at(col, row / E::kUnit), kPanel, E::load(place), E::load(place + width));
    }
  }
}

// What follows the last token where their number is odd.
template <class T>
void clear_padding(T* rows, const Sizes& s, int64_t width) {
  std::fill(rows + s.length * width, rows + s.padded * width, T(0));
}

// out = x * scale with scale = 1 / sqrt(mean(x^2) + eps) of each row.
template <class E>
AVX512 void norm_rows(const float* x, const Sizes& s, typename E::Stored* out, float* scales) {
  for (int64_t row = 0; row < s.length; ++row) {
    const float* from = x + row * s.width;
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < s.width; i += 2 * kLanes) {
      for (int j = 0; j < 2; ++j) {
        const __m512 value = _mm512_loadu_ps(from + i + j * kLanes);
        sum[j] = _mm512_fmadd_ps(value, value, sum[j]);
      }
    }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / static_cast<float>(s.width);
    scales[row] = 1.0f / std::sqrt(mean + s.eps);
    const __m512 scale = _mm512_set1_ps(scales[row]);
    for (int64_t i = 0; i < s.width; i += kLanes) {
      E::store(out + row * s.width + i, _mm512_mul_ps(scale, _mm512_loadu_ps(from + i)));
    }
  }
}

// d <- scale (d - out mean(d out)) in float32, and rounded by rows and by panels; the rows behind the last stay zero.
template <class E>
AVX512 void norm_rows_backward(float* d, const typename E::Stored* out, const float* scales, const Sizes& s,
                               typename E::Stored* rounded, const Panels& panels) {
  for (int64_t row = 0; row < s.length; ++row) {
    float* at = d + row * s.width;
    const auto* y = out + row * s.width;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < s.width; i += kLanes) sum = _mm512_fmadd_ps(_mm512_loadu_ps(at + i), E::load(y + i), sum);
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(s.width));
    const __m512 scale = _mm512_set1_ps(scales[row]);
    for (int64_t i = 0; i < s.width; i += kLanes) {
      const __m512 inner = _mm512_fnmadd_ps(E::load(y + i), mean, _mm512_loadu_ps(at + i));
      const __m512 result = _mm512_mul_ps(scale, inner);
      _mm512_storeu_ps(at + i, result);
      E::store(rounded + row * s.width + i, result);
    }
  }
  clear_padding(rounded, s, s.width);
  to_panels<E>(rounded, s.padded, s.width, panels);
}

// What the backward pass needs of one layer and sample, beyond its input and output.
template <class E>
struct Kept {
  typename E::Stored* middle;   // [padded, width]: between mixer and SwiGLU
  typename E::Stored* gate_up;  // [padded, 2 inner], in turns
  typename E::Stored*
      mixer;      // gate and up of the token mixer [width / 32, mix_inner, 64], or q, k, v [padded, 3 width]
  float* scales;  // of the mixer's norm: [width], or [length] for attention

  Kept(const Sizes& s, Arena& arena) {
    middle = arena.take<typename E::Stored>(s.padded * s.width);
    gate_up = arena.take<typename E::Stored>(s.padded * 2 * s.inner);
    mixer = arena.take<typename E::Stored>(s.attention() ? s.padded * 3 * s.width : 2 * s.mix_inner * s.width);
    scales = arena.take<float>(std::max(s.width, s.padded));
  }
};

// Memory of one thread.
template <class E>
struct MlpScratch {
  typename E::Stored *act, *d_gate_up;  // [padded, inner], [padded, 2 inner]
  typename E::Stored* rounded;          // [padded, width]
  float* sums;                          // [padded, width]

  MlpScratch(const Sizes& s, bool backward, Arena& arena) {
    act = arena.take<typename E::Stored>(s.padded * s.inner);
    sums = arena.take<float>(s.padded * s.width);
    if (!backward) return;
    d_gate_up = arena.take<typename E::Stored>(s.padded * 2 * s.inner);
    rounded = arena.take<typename E::Stored>(s.padded * s.width);
  }
};

// out <- rms(middle + SwiGLU(middle))
template <class E>
void mlp_forward(const Sizes& s, const MlpWeights& w, const Kept<E>& kept, bool keep, const MlpScratch<E>& scratch,
                 typename E::Stored* out, float* scales) {
  const auto middle = rows_of<E>(kept.middle, s.width);
  whole_product<E>(middle, s.padded, w.gate_up, 2 * s.inner,
                   StoreAct<E>{scratch.act, s.inner, keep ? kept.gate_up : nullptr});
  whole_product<E>(rows_of<E>(scratch.act, s.inner), s.padded, w.down, s.width,
                   AddResidual<E>{scratch.sums, kept.middle, s.width});
  norm_rows<E>(scratch.sums, s, out, scales);
}

// Gate and up once more, as mlp_forward keeps them.
template <class E>
void mlp_recompute(const Sizes& s, const MlpWeights& w, const Kept<E>& kept) {
  whole_product<E>(rows_of<E>(kept.middle, s.width), s.padded, w.gate_up, 2 * s.inner,
                   StoreAct<E>{nullptr, s.inner, kept.gate_up});
}

// d, the gradient of the output, becomes that of the middle. `operands` begin at the first row of this sample.
template <class E>
void mlp_backward(const Sizes& s, const MlpWeights& w, const Kept<E>& kept, const MlpScratch<E>& scratch,
                  const typename E::Stored* out, const float* scales, float* d, const MlpOperands& operands) {
  norm_rows_backward<E>(d, out, scales, s, scratch.rounded, operands.d_out);
  to_panels<E>(kept.middle, s.padded, s.width, operands.in);
  whole_product<E>(rows_of<E>(scratch.rounded, s.width), s.padded, w.down_back, s.inner,
                   BackThroughAct<E>{kept.gate_up, scratch.d_gate_up, operands.act, operands.d_gate_up, s.inner});
  whole_product<E>(rows_of<E>(scratch.d_gate_up, 2 * s.inner), s.padded, w.gate_up_back, s.width,
                   AddResidual<Float32>{d, d, s.width});
}

}  // namespace latent_update
