// One call of the network for one sample, forward and backward, and the packed weights that it reads.
#pragma once

#include <array>

#include "latent_update/attention.h"

namespace latent_update {

struct LayerWeights {
  MixerWeights mixer;
  AttentionWeights attention;
  MlpWeights mlp;
};

// The weights of a layer in the caller's order: [gate_up, down] or [qkv, out] of the mixer, then gate_up and down.
struct Given {
  Matrix mix_in, mix_out, gate_up, down;
};

template <class E>
Panels panels_for(Arena& arena, int64_t rows, int64_t cols) {
  const int64_t units = rows / E::kUnit;
  return {arena.take<uint32_t>(ceil_div(cols, kPanel) * kPanel * units), units};
}

template <class E>
Left rows_for(Arena& arena, int64_t rows, int64_t cols) {
  const int64_t units = cols / E::kUnit;
  return {arena.take<uint32_t>(rows * units), units, 1};
}

template <class E>
LayerWeights lay_out_weights(const Sizes& s, bool backward, Arena& arena) {
  LayerWeights w{};
  w.mlp.gate_up = panels_for<E>(arena, s.width, 2 * s.inner);
  w.mlp.down = panels_for<E>(arena, s.inner, s.width);
  if (s.attention()) {
    w.attention.qkv = panels_for<E>(arena, s.width, 3 * s.width);
    w.attention.out = panels_for<E>(arena, s.width, s.width);
  } else {
    w.mixer.gate_up = rows_for<E>(arena, 2 * s.mix_inner, s.padded);
    w.mixer.down = rows_for<E>(arena, s.padded, s.mix_inner);
  }
  if (!backward) return w;
  w.mlp.down_back = panels_for<E>(arena, s.width, s.inner);
  w.mlp.gate_up_back = panels_for<E>(arena, 2 * s.inner, s.width);
  if (s.attention()) {
    w.attention.out_back = panels_for<E>(arena, s.width, s.width);
    w.attention.qkv_back = panels_for<E>(arena, 3 * s.width, s.width);
  } else {
    w.mixer.down_back = rows_for<E>(arena, s.mix_inner, s.padded);
    w.mixer.gate_up_back = rows_for<E>(arena, s.padded, 2 * s.mix_inner);
  }
  return w;
}

template <class E>
void pack_weights(const Sizes& s, const Given& given, bool backward, const LayerWeights& w) {
  pack_panels<E>(given.gate_up.transposed(), w.mlp.gate_up, s.inner);
  pack_panels<E>(given.down.transposed(), w.mlp.down);
  if (s.attention()) {
    pack_panels<E>(given.mix_in.transposed(), w.attention.qkv);
    pack_panels<E>(given.mix_out.transposed(), w.attention.out);
  } else {
    pack_rows<E>(given.mix_in, 2 * s.mix_inner, w.mixer.gate_up, s.mix_inner);
    pack_rows<E>(given.mix_out, s.padded, w.mixer.down);
  }
  if (!backward) return;
  pack_panels<E>(given.down, w.mlp.down_back);
  pack_panels<E>(given.gate_up, w.mlp.gate_up_back, 0, s.inner);
  if (s.attention()) {
    pack_panels<E>(given.mix_out, w.attention.out_back);
    pack_panels<E>(given.mix_in, w.attention.qkv_back);
  } else {
    pack_rows<E>(given.mix_out.transposed(), s.mix_inner, w.mixer.down_back);
    pack_rows<E>(given.mix_in.transposed(), s.padded, w.mixer.gate_up_back);
  }
}

struct Operands {
  MlpOperands mlp;
  AttentionOperands attention;

  Operands() = default;

  // The whole batch, `rows` in all.
  template <class E>
  static Operands lay_out(const Sizes& s, int64_t rows, Arena& arena) {
    Operands o;
    o.mlp = {panels_for<E>(arena, rows, s.width), panels_for<E>(arena, rows, s.inner),
             panels_for<E>(arena, rows, s.width), panels_for<E>(arena, rows, 2 * s.inner)};
    if (s.attention()) {
      o.attention = {panels_for<E>(arena, rows, s.width), panels_for<E>(arena, rows, s.width),
                     panels_for<E>(arena, rows, s.width), panels_for<E>(arena, rows, 3 * s.width)};
    }
    return o;
  }

  Operands from(int64_t unit) const {
    const auto move = [&](const Panels& p) { return from_unit(p, unit); };
    Operands o;
    o.mlp = {move(mlp.in), move(mlp.act), move(mlp.d_out), move(mlp.d_gate_up)};
    o.attention = {move(attention.in), move(attention.mixed), move(attention.d_out), move(attention.d_qkv)};
    return o;
  }
};

// Up to three tensors [length, width] whose sum a call begins with: first + (second + third), each sum rounded.
template <class E>
using Addends = std::array<const typename E::Stored*, 3>;

// One thread with its memory.
template <class E>
class Worker {
 public:
  using Stored = typename E::Stored;

  Worker(const Sizes& s, bool backward, Arena& arena)
      : s_(s),
        rows_(arena.take<Stored>(s.padded * s.width)),
        panels_(panels_for<E>(arena, s.padded, s.width)),
        kept_(s, arena),
        mlp_(s, backward, arena),
        mixer_(s, backward, arena),
        attention_(s, backward, arena),
        spare_(arena.take<float>(s.padded)) {}

  // out <- layer(sum of the addends); `kept` null keeps nothing, and `scales` receives the last norm's.
  void forward(const LayerWeights& w, const Addends<E>& addends, const Kept<E>* kept, Stored* out, float* scales) {
    const Kept<E>& place = kept == nullptr ? kept_ : *kept;
    mix(w, addends, place, kept != nullptr);
    mlp_forward<E>(s_, w.mlp, place, kept != nullptr, mlp_, out, scales);
  }

  // d, the gradient of `out`, becomes that of the sum of the addends; `kept` null computes once more what is needed.
  void backward(const LayerWeights& w, const Addends<E>& addends, const Kept<E>* kept, const Stored* out,
                const float* scales, float* d, const Operands& operands, const MixerGradients* gradients) {
    const Kept<E>& place = kept == nullptr ? kept_ : *kept;
    if (kept == nullptr) {
      mix(w, addends, place, true);
      mlp_recompute<E>(s_, w.mlp, place);
    } else {
      load(addends);
    }
    mlp_backward<E>(s_, w.mlp, place, mlp_, out, scales, d, operands.mlp);
    if (s_.attention()) {
      attention_backward<E>(s_, w.attention, rows_, place, attention_, mlp_.rounded, d, operands.attention);
    } else {
      mixer_backward<E>(s_, w.mixer, panels_, place, mixer_, d, *gradients);
    }
  }

  float* spare() { return spare_; }  // [padded], for scales that nobody needs

 private:
  void mix(const LayerWeights& w, const Addends<E>& addends, const Kept<E>& place, bool keep) {
    load(addends);
    if (s_.attention()) {
      attention_forward<E>(s_, w.attention, rows_, place, attention_, mlp_.sums);
    } else {
      mixer_forward<E>(s_, w.mixer, panels_, place, keep, mixer_);
    }
  }

  AVX512 static __m512 sum(const Addends<E>& a, int64_t i) {
    const __m512 first = E::load(a[0] + i);
    if (a[1] == nullptr) return first;
    const __m512 second = E::load(a[1] + i);
    return _mm512_add_ps(first, a[2] == nullptr ? second : E::round(_mm512_add_ps(second, E::load(a[2] + i))));
  }

  AVX512 void load(const Addends<E>& addends) {
    for (int64_t row = 0; row < s_.padded; row += 2) {
      for (int64_t col = 0; col < s_.width; col += kLanes) {
        const int64_t i = row * s_.width + col;
        const __m512 a = sum(addends, i);
        const __m512 b = row + 1 < s_.length ? sum(addends, i + s_.width) : _mm512_setzero_ps();
        if (s_.attention()) {
          E::store(rows_ + i, a);
          E::store(rows_ + i + s_.width, b);
        } else {
          E::store_rows(panels_.at(col, row / E::kUnit), kPanel, a, b);
        }
      }
    }
  }

  const Sizes s_;
  Stored* rows_;   // the input of a layer: for attention,
  Panels panels_;  // and for the token mixer
  Kept<E> kept_;
  MlpScratch<E> mlp_;
  MixerScratch<E> mixer_;
  AttentionScratch<E> attention_;
  float* spare_;
};

}  // namespace latent_update
