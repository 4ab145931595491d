// The mixer along the sequence of one sample: h <- rms(h + SwiGLU over tokens), with one scale for each channel. It is
// computed for 32 channels at a time, which never leave the nearest caches. Nothing is transposed: weights stand left.
#pragma once

#include "common/transpose.h"
#include "latent_update/mlp.h"

namespace latent_update {

struct MixerWeights {
  Left gate_up, down;            // [2 mix_inner] rows, gate before up in each tile; [padded] rows
  Left down_back, gate_up_back;  // [mix_inner] rows; [padded] rows
};

// Gradients of weights that one thread sums: [mix_inner, tokens] and [2 mix_inner, tokens], tokens in full panels.
struct MixerGradients {
  float *down, *gate_up;
  int64_t tokens;

  MixerGradients(const Sizes& s, Arena& arena) : tokens(s.token_panels() * kPanel) {
    down = arena.take<float>(s.mix_inner * tokens);
    gate_up = arena.take<float>(2 * s.mix_inner * tokens);
  }
};

template <class E>
struct MixerScratch {
  using Stored = typename E::Stored;
  Panels act;                  // one panel, [mix_inner]
  float* sums;                 // [padded, 32]
  Panels d_out, d_gate_up;     // one panel each: [padded], [2 mix_inner]
  Stored *act_rows, *d_rows;   // [mix_inner, width], [2 mix_inner, width]
  Panels in_turned, d_turned;  // [width] by tokens

  MixerScratch(const Sizes& s, bool backward, Arena& arena) {
    if (s.attention()) return;
    const auto panels = [&](int64_t count, int64_t rows) {
      return Panels{arena.take<uint32_t>(count * rows / E::kUnit * kPanel), rows / E::kUnit};
    };
    act = panels(1, s.mix_inner);
    sums = arena.take<float>(s.padded * kPanel);
    if (!backward) return;
    d_out = panels(1, s.padded);
    d_gate_up = panels(1, 2 * s.mix_inner);
    act_rows = arena.take<Stored>(s.mix_inner * s.width);
    d_rows = arena.take<Stored>(2 * s.mix_inner * s.width);
    in_turned = panels(s.token_panels(), s.width);
    d_turned = panels(s.token_panels(), s.width);
  }
};

template <class E>
struct StoreActPanel {
  uint32_t* act;
  typename E::Stored* kept;  // [mix_inner, 64], or null

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t, const __m512 (&sums)[R][C]) const {
    constexpr int kHalf = R / 2;
#pragma GCC unroll 6
    for (int r = 0; r + 1 < kHalf; r += 2) {
      const int64_t at = row / 2 + r;
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const __m512 a = swiglu<E>(sums[r][c], sums[kHalf + r][c]);
        const __m512 b = swiglu<E>(sums[r + 1][c], sums[kHalf + r + 1][c]);
        E::store_rows(act + at / E::kUnit * kPanel + c * kLanes, kPanel, a, b);
        if (kept == nullptr) continue;
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          E::store(kept + (at + i) * 2 * kPanel + c * kLanes, sums[r + i][c]);
          E::store(kept + (at + i) * 2 * kPanel + kPanel + c * kLanes, sums[kHalf + r + i][c]);
        }
      }
    }
  }
};

// sums + residual in float32, and the squares of each channel.
template <class E>
struct AddPanel {
  float* out;  // [padded, 32]
  const uint32_t* residual;
  float* squares;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      __m512 square = _mm512_load_ps(squares + c * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; r += 2) {
        __m512 a, b;
        E::load_rows(residual + (row + r) / E::kUnit * kPanel + c * kLanes, kPanel, a, b);
        a = _mm512_add_ps(a, sums[r][c]);
        b = _mm512_add_ps(b, sums[r + 1][c]);
        square = _mm512_fmadd_ps(b, b, _mm512_fmadd_ps(a, a, square));
        _mm512_storeu_ps(out + (row + r) * kPanel + c * kLanes, a);
        _mm512_storeu_ps(out + (row + r + 1) * kPanel + c * kLanes, b);
      }
      _mm512_store_ps(squares + c * kLanes, square);
    }
  }
};

template <class E>
AVX512 void norm_columns(const float* x, const float* squares, const Sizes& s, int64_t col, typename E::Stored* out,
                         float* scales) {
  const __m512 count = _mm512_set1_ps(static_cast<float>(s.length)), eps = _mm512_set1_ps(s.eps);
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const __m512 mean = _mm512_div_ps(_mm512_load_ps(squares + c), count);
    const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_add_ps(mean, eps)));
    _mm512_storeu_ps(scales + col + c, scale);
    for (int64_t row = 0; row < s.padded; ++row) {
      E::store(out + row * s.width + col + c, _mm512_mul_ps(scale, _mm512_loadu_ps(x + row * kPanel + c)));
    }
  }
}

// middle <- rms(in + SwiGLU over the tokens of in); `in` has its tokens as units.
template <class E>
void mixer_forward(const Sizes& s, const MixerWeights& w, const Panels& in, const Kept<E>& kept, bool keep,
                   const MixerScratch<E>& scratch) {
  for (int64_t col = 0; col < s.width; col += kPanel) {
    alignas(64) float squares[kPanel] = {};
    auto* pre = keep ? kept.mixer + col * 2 * s.mix_inner : nullptr;
    panel_product<E, 2>(w.gate_up, 2 * s.mix_inner, in.at(col), in.units, col, StoreActPanel<E>{scratch.act.words, pre},
                        4);
    panel_product<E, 2>(w.down, s.padded, scratch.act.words, scratch.act.units, col,
                        AddPanel<E>{scratch.sums, in.at(col), squares});
    norm_columns<E>(scratch.sums, squares, s, col, kept.middle, kept.scales);
  }
}

template <class E>
struct BackThroughActPanel {
  const typename E::Stored* kept;  // [mix_inner, 64]
  const MixerScratch<E>& scratch;
  const Sizes& s;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 6
    for (int r = 0; r < R; r += 2) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        __m512 act[2], d_gate[2], d_up[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const auto* gate = kept + (row + r + i) * 2 * kPanel + c * kLanes;
          swiglu_backward<E>(E::load(gate), E::load(gate + kPanel), sums[r + i][c], act[i], d_gate[i], d_up[i]);
          const int64_t at = (row + r + i) * s.width + col + c * kLanes;
          E::store(scratch.act_rows + at, act[i]);
          E::store(scratch.d_rows + at, d_gate[i]);
          E::store(scratch.d_rows + s.mix_inner * s.width + at, d_up[i]);
        }
        E::store_rows(scratch.d_gate_up.at(c * kLanes, (row + r) / E::kUnit), kPanel, d_gate[0], d_gate[1]);
        E::store_rows(scratch.d_gate_up.at(c * kLanes, (s.mix_inner + row + r) / E::kUnit), kPanel, d_up[0], d_up[1]);
      }
    }
  }
};

struct AddTo {
  float* out;
  int64_t width;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        float* at = out + (row + r) * width + col + c * kLanes;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[r][c]));
      }
    }
  }
};

// d <- scale (d - y mean(d y)) for 32 channels, over the tokens; also rounded into a panel.
template <class E>
AVX512 void norm_columns_backward(float* d, const typename E::Stored* y, const float* scales, const Sizes& s,
                                  int64_t col, const Panels& rounded) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    float* at = d + col + c;
    const auto* out = y + col + c;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t row = 0; row < s.length; ++row) {
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(at + row * s.width), E::load(out + row * s.width), sum);
    }
    const __m512 mean = _mm512_div_ps(sum, _mm512_set1_ps(static_cast<float>(s.length)));
    const __m512 scale = _mm512_loadu_ps(scales + col + c);
    for (int64_t row = 0; row < s.padded; row += 2) {
      __m512 pair[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t place = (row + i) * s.width;
        const __m512 inner = _mm512_fnmadd_ps(E::load(out + place), mean, _mm512_loadu_ps(at + place));
        pair[i] = _mm512_mul_ps(scale, inner);
        _mm512_storeu_ps(at + place, pair[i]);
      }
      E::store_rows(rounded.at(c, row / E::kUnit), kPanel, pair[0], pair[1]);
    }
  }
}

// 32 channels of tokens, given as a panel with tokens as units, into panels with channels as units.
template <class E>
AVX512 void turn_panel(const Panels& panel, int64_t rows, int64_t col, const Panels& out) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    for (int64_t row = 0; row < rows; row += kLanes) {
      __m512i block[kLanes];
      for (int64_t r = 0; r < kLanes; r += 2) {
        __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
        if (row + r < rows) E::load_rows(panel.at(c, (row + r) / E::kUnit), kPanel, a, b);
        block[r] = _mm512_castps_si512(a);
        block[r + 1] = _mm512_castps_si512(b);
      }
      trm_fast::transpose(block);
      for (int64_t r = 0; r < kLanes; r += 2) {
        E::store_rows(out.at(row, (col + c + r) / E::kUnit), kPanel, _mm512_castsi512_ps(block[r]),
                      _mm512_castsi512_ps(block[r + 1]));
      }
    }
  }
}

// d, the gradient of the middle, becomes that of `in`.
template <class E>
void mixer_backward(const Sizes& s, const MixerWeights& w, const Panels& in, const Kept<E>& kept,
                    const MixerScratch<E>& scratch, float* d, const MixerGradients& gradients) {
  for (int64_t col = 0; col < s.width; col += kPanel) {
    norm_columns_backward<E>(d, kept.middle, kept.scales, s, col, scratch.d_out);
    turn_panel<E>(scratch.d_out, s.padded, col, scratch.d_turned);
    turn_panel<E>(Panels{in.at(col), in.units}, s.padded, col, scratch.in_turned);
    panel_product<E, 2>(w.down_back, s.mix_inner, scratch.d_out.words, scratch.d_out.units, col,
                        BackThroughActPanel<E>{kept.mixer + col * 2 * s.mix_inner, scratch, s});
    panel_product<E, 2>(w.gate_up_back, s.padded, scratch.d_gate_up.words, scratch.d_gate_up.units, col,
                        AddResidual<Float32>{d, d, s.width});
  }
  product<E>(rows_of<E>(scratch.act_rows, s.width), s.mix_inner, scratch.d_turned, s.length,
             AddTo{gradients.down, gradients.tokens});
  product<E>(rows_of<E>(scratch.d_rows, s.width), 2 * s.mix_inner, scratch.in_turned, s.length,
             AddTo{gradients.gate_up, gradients.tokens});
}

}  // namespace latent_update
