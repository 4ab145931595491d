// Full attention over the tokens of one sample with rotary positions: h <- rms(h + Wo attention(Wqkv h)). Scores are
// taken for a block of rows and all keys at once, so that the softmax needs no second pass.
#pragma once

#include "common/transpose.h"
#include "latent_update/token_mixer.h"

namespace latent_update {

struct AttentionWeights {
  Panels qkv, out, out_back, qkv_back;
  const float* rope;  // cosines and signed sines [2, length, head_dim], of both halves; null without positions
};

struct AttentionOperands {
  Panels in, mixed, d_out, d_qkv;
};

constexpr int64_t kQueryRows = 96;  // of a block of scores: eight tiles

template <class E>
struct AttentionScratch {
  using Stored = typename E::Stored;
  Stored *mixed, *d_qkv;                  // [padded, width], [padded, 3 width]
  Stored *q, *d_rows;                     // [padded, head_dim], [kQueryRows, keys]
  float *scores, *d_scores;               // [kQueryRows, keys]
  Panels k_turned, v;                     // [head_dim] by tokens, [tokens] by head_dim
  Panels q_panels, k, v_turned, d_mixed;  // [tokens] by head_dim, but v_turned
  Panels weights, d_weights;              // [kQueryRows] by tokens
  float *d_q, *d_k, *d_v;                 // [keys, head_dim], rows in full panels
  Stored* d_mixed_rows;                   // [padded, width]

  AttentionScratch(const Sizes& s, bool backward, Arena& arena) {
    if (!s.attention()) return;
    const int64_t keys = s.token_panels() * kPanel, dim = s.head_dim(), columns = ceil_div(dim, kPanel) * kPanel;
    const auto panels = [&](int64_t cols, int64_t rows) {
      return Panels{arena.take<uint32_t>(cols * rows / E::kUnit), rows / E::kUnit};
    };
    mixed = arena.take<Stored>(s.padded * s.width);
    q = arena.take<Stored>(s.padded * dim);
    scores = arena.take<float>(kQueryRows * keys);
    d_rows = arena.take<Stored>(kQueryRows * keys);
    k_turned = panels(keys, dim);
    v = panels(columns, s.padded);
    if (!backward) return;
    d_qkv = arena.take<Stored>(s.padded * 3 * s.width);
    d_mixed_rows = arena.take<Stored>(s.padded * s.width);
    d_scores = arena.take<float>(kQueryRows * keys);
    q_panels = panels(columns, s.padded);
    k = panels(columns, s.padded);
    v_turned = panels(keys, dim);
    d_mixed = panels(columns, s.padded);
    weights = panels(keys, kQueryRows);
    d_weights = panels(keys, kQueryRows);
    d_q = arena.take<float>(keys * dim);
    d_k = arena.take<float>(keys * dim);
    d_v = arena.take<float>(keys * dim);
  }
};

// Rotates both halves of the head in place; `sign` -1 turns back.
template <class E>
AVX512 void rotate(typename E::Stored* head, const float* rope, const Sizes& s, int64_t row, float sign) {
  const int64_t dim = s.head_dim(), half = dim / 2;
  const float *cosines = rope + row * dim, *sines = rope + (s.length + row) * dim + half;
  for (int64_t i = 0; i < half; i += kLanes) {
    const __mmask16 mask = lanes(half - i);
    const __m512 cosine = _mm512_maskz_loadu_ps(mask, cosines + i);
    const __m512 sine = _mm512_mul_ps(_mm512_set1_ps(sign), _mm512_maskz_loadu_ps(mask, sines + i));
    const __m512 a = E::load(head + i, mask), b = E::load(head + half + i, mask);
    E::store(head + i, _mm512_fnmadd_ps(b, sine, _mm512_mul_ps(a, cosine)), mask);
    E::store(head + half + i, _mm512_fmadd_ps(a, sine, _mm512_mul_ps(b, cosine)), mask);
  }
}

// Turns the queries and keys of all heads, in [padded, 3 width].
template <class E>
void rotate_all(typename E::Stored* qkv, const float* rope, const Sizes& s, float sign) {
  if (rope == nullptr) return;
  for (int64_t row = 0; row < s.length; ++row) {
    for (int64_t head = 0; head < 2 * s.heads; ++head) {
      rotate<E>(qkv + row * 3 * s.width + head * s.head_dim(), rope, s, row, sign);
    }
  }
}

// [padded] rows of one head, `step` values apart, as panels with tokens as units.
template <class E>
AVX512 void head_panels(const typename E::Stored* head, int64_t step, const Sizes& s, const Panels& out) {
  for (int64_t row = 0; row < s.padded; row += 2) {
    for (int64_t col = 0; col < s.head_dim(); col += kLanes) {
      const auto* place = head + row * step + col;
      const __m512 second = row + 1 < s.length ? E::load(place + step) : _mm512_setzero_ps();
      E::store_rows(out.at(col, row / E::kUnit), kPanel, E::load(place), second);
    }
  }
}

// The same as panels with the head's features as units and tokens as columns, zero behind the last.
template <class E>
AVX512 void head_turned(const typename E::Stored* head, int64_t step, const Sizes& s, const Panels& out) {
  for (int64_t row = 0; row < s.token_panels() * kPanel; row += kLanes) {
    for (int64_t col = 0; col < s.head_dim(); col += kLanes) {
      __m512i block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const bool real = row + r < s.length;
        block[r] = _mm512_castps_si512(real ? E::load(head + (row + r) * step + col) : _mm512_setzero_ps());
      }
      trm_fast::transpose(block);
      for (int64_t r = 0; r < kLanes; r += 2) {
        E::store_rows(out.at(row, (col + r) / E::kUnit), kPanel, _mm512_castsi512_ps(block[r]),
                      _mm512_castsi512_ps(block[r + 1]));
      }
    }
  }
}

struct StoreFloats {
  float* out;
  int64_t width;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + (row + r) * width + col + c * kLanes, sums[r][c]);
    }
  }
};

AVX512 inline __m512 masked(__m512 x, int64_t count) { return _mm512_maskz_mov_ps(lanes(count), x); }

// Each row of scores becomes its softmax, with zeros behind the last key.
template <class E>
AVX512 void softmax_rows(float* scores, int64_t rows, int64_t keys, const Sizes& s) {
  const __m512 scale = _mm512_set1_ps(kLog2E / std::sqrt(static_cast<float>(s.head_dim())));
  for (int64_t row = 0; row < rows; ++row) {
    float* at = scores + row * keys;
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < s.length; i += kLanes) {
      largest = _mm512_mask_max_ps(largest, lanes(s.length - i), largest, _mm512_loadu_ps(at + i));
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < keys; i += kLanes) {
      const __m512 above = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(at + i), top), scale);
      // A product that is no number must stay one, which the bounds of exp2 would hide.
      const __m512 e = _mm512_fmadd_ps(_mm512_setzero_ps(), above, exp2<E>(above));
      const __m512 seen = masked(e, s.length - i);
      sum = _mm512_add_ps(sum, seen);
      _mm512_storeu_ps(at + i, seen);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < keys; i += kLanes)
      _mm512_storeu_ps(at + i, _mm512_mul_ps(inverse, _mm512_loadu_ps(at + i)));
  }
}

template <class E>
AVX512 void round_rows(const float* x, int64_t size, typename E::Stored* out) {
  for (int64_t i = 0; i < size; i += kLanes) E::store(out + i, _mm512_loadu_ps(x + i));
}

template <class E>
AVX512 void copy_head(const typename E::Stored* head, int64_t step, const Sizes& s, typename E::Stored* out) {
  for (int64_t row = 0; row < s.padded; ++row) {
    for (int64_t i = 0; i < s.head_dim(); i += kLanes) {
      E::store(out + row * s.head_dim() + i, row < s.length ? E::load(head + row * step + i) : _mm512_setzero_ps());
    }
  }
}

// What the scores of one head need.
template <class E>
void prepare_head(const typename E::Stored* qkv, int64_t head, const Sizes& s, const AttentionScratch<E>& scratch) {
  const auto* q = qkv + head * s.head_dim();
  copy_head<E>(q, 3 * s.width, s, scratch.q);
  head_turned<E>(q + s.width, 3 * s.width, s, scratch.k_turned);
}

// The attention weights of a block of queries, in float32.
template <class E>
int64_t attend_block(int64_t first, const Sizes& s, const AttentionScratch<E>& scratch) {
  const int64_t rows = std::min(kQueryRows, s.padded - first), keys = s.token_panels() * kPanel;
  whole_product<E>(rows_of<E>(scratch.q + first * s.head_dim(), s.head_dim()), rows, scratch.k_turned, keys,
                   StoreFloats{scratch.scores, keys});
  softmax_rows<E>(scratch.scores, rows, keys, s);
  return rows;
}

// middle <- rms(in + Wo attention(Wqkv in)); `in` is [padded, width].
template <class E>
void attention_forward(const Sizes& s, const AttentionWeights& w, const typename E::Stored* in, const Kept<E>& kept,
                       const AttentionScratch<E>& scratch, float* sums) {
  const int64_t keys = s.token_panels() * kPanel, dim = s.head_dim();
  whole_product<E>(rows_of<E>(in, s.width), s.padded, w.qkv, 3 * s.width, StoreRows<E>{kept.mixer, 3 * s.width});
  rotate_all<E>(kept.mixer, w.rope, s, 1.0f);
  for (int64_t head = 0; head < s.heads; ++head) {
    prepare_head<E>(kept.mixer, head, s, scratch);
    head_panels<E>(kept.mixer + 2 * s.width + head * dim, 3 * s.width, s, scratch.v);
    for (int64_t first = 0; first < s.padded; first += kQueryRows) {
      const int64_t rows = attend_block<E>(first, s, scratch);
      round_rows<E>(scratch.scores, rows * keys, scratch.d_rows);
      const Left weights{reinterpret_cast<const uint32_t*>(scratch.d_rows), keys / E::kUnit, 1};
      product<E>(weights, rows, scratch.v, dim, StoreRows<E>{scratch.mixed + first * s.width + head * dim, s.width});
    }
  }
  whole_product<E>(rows_of<E>(scratch.mixed, s.width), s.padded, w.out, s.width, AddResidual<E>{sums, in, s.width});
  norm_rows<E>(sums, s, kept.middle, kept.scales);
  clear_padding(kept.middle, s, s.width);
}

// Scores get their gradients: weights (d_weights - sum(weights d_weights)) scale. Both are rounded as panels by rows.
template <class E>
AVX512 void softmax_backward(int64_t rows, int64_t keys, const Sizes& s, const AttentionScratch<E>& scratch) {
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(s.head_dim())));
  for (int64_t row = 0; row < rows; row += 2) {
    __m512 mean[2];
    for (int r = 0; r < 2; ++r) {
      const int64_t at = (row + r) * keys;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < keys; i += kLanes) {
        sum =
            _mm512_fmadd_ps(_mm512_loadu_ps(scratch.scores + at + i), _mm512_loadu_ps(scratch.d_scores + at + i), sum);
      }
      mean[r] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    }
    for (int64_t i = 0; i < keys; i += kLanes) {
      __m512 weight[2], d[2];
      for (int r = 0; r < 2; ++r) {
        const int64_t at = (row + r) * keys + i;
        weight[r] = _mm512_loadu_ps(scratch.scores + at);
        const __m512 inner = _mm512_sub_ps(_mm512_loadu_ps(scratch.d_scores + at), mean[r]);
        d[r] = _mm512_mul_ps(_mm512_mul_ps(weight[r], scale), inner);
        E::store(scratch.d_rows + at, d[r]);
      }
      E::store_rows(scratch.weights.at(i, row / E::kUnit), kPanel, weight[0], weight[1]);
      E::store_rows(scratch.d_weights.at(i, row / E::kUnit), kPanel, d[0], d[1]);
    }
  }
}

// out += left^T right, where left has `keys` columns.
template <class E>
void add_columns(const Panels& left, int64_t units, const Panels& right, const Sizes& s, float* out) {
  for (int64_t panel = 0; panel < s.token_panels(); ++panel) {
    for (int64_t col = 0; col < s.head_dim(); col += kPanel) {
      const AddTo add{out + panel * kPanel * s.head_dim(), s.head_dim()};
      if (s.head_dim() - col > kLanes) {
        panel_product<E, 2>(by_columns(left, panel), kPanel, right.at(col), units, col, add);
      } else {
        panel_product<E, 1>(by_columns(left, panel), kPanel, right.at(col), units, col, add);
      }
    }
  }
}

template <class E>
AVX512 void store_head(const float* x, const Sizes& s, typename E::Stored* head, int64_t step) {
  for (int64_t row = 0; row < s.length; ++row) {
    for (int64_t i = 0; i < s.head_dim(); i += kLanes) {
      E::store(head + row * step + i, _mm512_loadu_ps(x + row * s.head_dim() + i));
    }
  }
}

// The gradients of q, k and v of one head, still rotated. The mixed values are computed once more for Wo.
template <class E>
void head_backward(const typename E::Stored* qkv, int64_t head, const Sizes& s, const AttentionScratch<E>& scratch) {
  const int64_t keys = s.token_panels() * kPanel, dim = s.head_dim(), step = 3 * s.width;
  prepare_head<E>(qkv, head, s, scratch);
  const auto* q = qkv + head * dim;
  head_panels<E>(q, step, s, scratch.q_panels);
  head_panels<E>(q + s.width, step, s, scratch.k);
  head_panels<E>(q + 2 * s.width, step, s, scratch.v);
  head_turned<E>(q + 2 * s.width, step, s, scratch.v_turned);
  head_panels<E>(scratch.d_mixed_rows + head * dim, s.width, s, scratch.d_mixed);
  std::fill_n(scratch.d_k, keys * dim, 0.0f);
  std::fill_n(scratch.d_v, keys * dim, 0.0f);
  for (int64_t first = 0; first < s.padded; first += kQueryRows) {
    const int64_t rows = attend_block<E>(first, s, scratch), units = rows / E::kUnit, unit = first / E::kUnit;
    round_rows<E>(scratch.scores, rows * keys, scratch.d_rows);
    const Left block{reinterpret_cast<const uint32_t*>(scratch.d_rows), keys / E::kUnit, 1};
    product<E>(block, rows, scratch.v, dim, StoreRows<E>{scratch.mixed + first * s.width + head * dim, s.width});
    whole_product<E>(rows_of<E>(scratch.d_mixed_rows + first * s.width + head * dim, s.width), rows, scratch.v_turned,
                     keys, StoreFloats{scratch.d_scores, keys});
    softmax_backward<E>(rows, keys, s, scratch);
    product<E>(block, rows, scratch.k, dim, StoreFloats{scratch.d_q + first * dim, dim});
    add_columns<E>(scratch.d_weights, units, from_unit(scratch.q_panels, unit), s, scratch.d_k);
    add_columns<E>(scratch.weights, units, from_unit(scratch.d_mixed, unit), s, scratch.d_v);
  }
  auto* d = scratch.d_qkv + head * dim;
  store_head<E>(scratch.d_q, s, d, step);
  store_head<E>(scratch.d_k, s, d + s.width, step);
  store_head<E>(scratch.d_v, s, d + 2 * s.width, step);
}

// d, the gradient of the middle, becomes that of `in`. `operands` begin at the first row of this sample.
template <class E>
void attention_backward(const Sizes& s, const AttentionWeights& w, const typename E::Stored* in, const Kept<E>& kept,
                        const AttentionScratch<E>& scratch, typename E::Stored* rounded, float* d,
                        const AttentionOperands& operands) {
  norm_rows_backward<E>(d, kept.middle, kept.scales, s, rounded, operands.d_out);
  whole_product<E>(rows_of<E>(rounded, s.width), s.padded, w.out_back, s.width,
                   StoreRows<E>{scratch.d_mixed_rows, s.width});
  for (int64_t head = 0; head < s.heads; ++head) head_backward<E>(kept.mixer, head, s, scratch);
  rotate_all<E>(scratch.d_qkv, w.rope, s, -1.0f);
  clear_padding(scratch.d_qkv, s, 3 * s.width);
  to_panels<E>(in, s.padded, s.width, operands.in);
  to_panels<E>(scratch.mixed, s.padded, s.width, operands.mixed);
  to_panels<E>(scratch.d_qkv, s.padded, 3 * s.width, operands.d_qkv);
  whole_product<E>(rows_of<E>(scratch.d_qkv, 3 * s.width), s.padded, w.qkv_back, s.width,
                   AddResidual<Float32>{d, d, s.width});
}

}  // namespace latent_update
