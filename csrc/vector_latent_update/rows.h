// What happens to the rows of one block, which stay in the caches of one thread: an update of a state, and its way
// back.
#pragma once

#include <cmath>

#include "vector_latent_update/gelu.h"
#include "vector_latent_update/network.h"

namespace vector_latent_update {

constexpr float kEps = 1e-5f;

// What the backward pass needs from inside an update.
template <class E>
struct Inside {
  Panels act;  // gelu(..), from `unit` on
  int64_t unit;
  typename E::Stored *slope, *normed;  // gelu'(..), (p - mean) / deviation: [rows, hidden]
  float* scales;                       // 1 / deviation
};

template <class E>
Left left_of(const typename E::Stored* rows, int64_t width) {
  return {reinterpret_cast<const uint32_t*>(rows), width / E::kUnit, 1};
}

// Rows times the columns [col, end) of panels, of which `depth` rows from `first` on are summed.
template <class E, class Out>
void rows_product(const Left& left, int64_t rows, const Panels& right, int64_t first, int64_t depth, int64_t col,
                  int64_t end, const Out& out) {
  for (; col < end; col += kPanel) {
    panel_product<E, 2>(left, rows, right.at(col, first / E::kUnit), depth / E::kUnit, col, out);
  }
}

// out = sums + add. A row of 0 words repeats a bias.
struct AddTo {
  float* out;
  int64_t out_row;
  const float* add;
  int64_t add_row;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const int64_t at = col + c * kLanes;
        const __m512 more = _mm512_loadu_ps(add + (row + r) * add_row + at);
        _mm512_storeu_ps(out + (row + r) * out_row + at, _mm512_add_ps(sums[r][c], more));
      }
    }
  }
};

// gelu(sums + add), and, if wanted, what the backward pass needs of it.
template <class E>
struct Gelu {
  typename E::Stored* act;
  int64_t width;
  const float* add;
  int64_t add_row;
  const Inside<E>* inside;  // or null

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 6
    for (int r = 0; r < R; r += 2) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        const int64_t at = col + c * kLanes;
        __m512 a[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t here = row + r + i, place = here * width + at;
          const __m512 x = _mm512_add_ps(sums[r + i][c], _mm512_loadu_ps(add + here * add_row + at));
          const __m512 phi = normal_distribution<E>(x);
          a[i] = _mm512_mul_ps(x, phi);
          E::store(act + place, a[i]);
          if (inside != nullptr) E::store(inside->slope + place, gelu_slope<E>(x, phi));
        }
        if (inside != nullptr)
          E::store_rows(inside->act.at(at, inside->unit + (row + r) / E::kUnit), kPanel, a[0], a[1]);
      }
    }
  }
};

// The gradient of an activation becomes that of what went into the gelu.
template <class E>
struct BackThroughGelu {
  const typename E::Stored* slope;
  typename E::Stored* rounded;  // [rows, width]
  int64_t width;
  Panels panels;
  int64_t unit;
  float* total;  // [rows, width] += gradient, or null
  float* bias;   // [width] += gradient of all rows

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const int64_t at = col + c * kLanes;
      __m512 of_all = _mm512_loadu_ps(bias + at);
#pragma GCC unroll 6
      for (int r = 0; r < R; r += 2) {
        __m512 d[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t place = (row + r + i) * width + at;
          d[i] = _mm512_mul_ps(sums[r + i][c], E::load(slope + place));
          E::store(rounded + place, d[i]);
          of_all = _mm512_add_ps(of_all, d[i]);
          if (total != nullptr) _mm512_storeu_ps(total + place, _mm512_add_ps(_mm512_loadu_ps(total + place), d[i]));
        }
        E::store_rows(panels.at(at, unit + (row + r) / E::kUnit), kPanel, d[0], d[1]);
      }
      _mm512_storeu_ps(bias + at, of_all);
    }
  }
};

AVX512 inline float mean_of(const float* row, int64_t width, float shift, bool squared) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const __m512 by = _mm512_set1_ps(shift);
  for (int64_t i = 0; i < width; i += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(row + i + j * kLanes), by);
      sums[j] = squared ? _mm512_fmadd_ps(x, x, sums[j]) : _mm512_add_ps(x, sums[j]);
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) / static_cast<float>(width);
}

// state += step * LN(p), unless state is null; keeps what `inside` asks for.
template <class E>
AVX512 void norm_rows(const float* p, int64_t rows, int64_t width, const Net& net, float step,
                      typename E::Stored* state, int64_t state_row, const Inside<E>* inside) {
  const __m512 by = _mm512_set1_ps(step);
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = p + row * width;
    const float mean = mean_of(from, width, 0.0f, false);
    const float scale = 1.0f / std::sqrt(mean_of(from, width, mean, true) + kEps);
    const __m512 m = _mm512_set1_ps(mean), s = _mm512_set1_ps(scale);
    if (inside != nullptr) inside->scales[row] = scale;
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from + i), m), s);
      if (inside != nullptr) E::store(inside->normed + row * width + i, normed);
      if (state == nullptr) continue;
      const __m512 out = _mm512_fmadd_ps(normed, _mm512_loadu_ps(net.gain + i), _mm512_loadu_ps(net.shift + i));
      auto* place = state + row * state_row + i;
      E::store(place, _mm512_fmadd_ps(by, out, E::load(place)));
    }
  }
}

// Sums over rows that give the gradients of vectors.
struct VectorSums {
  float *in_bias, *out_bias, *gain, *shift;  // [width]
};

// d, the gradient of state + step * LN(p), becomes that of p: rounded by rows and by panels.
template <class E>
AVX512 void norm_rows_backward(const float* d, int64_t d_row, int64_t rows, int64_t width, const Net& net, float step,
                               const Inside<E>& inside, typename E::Stored* rounded, const Panels& panels, int64_t unit,
                               const VectorSums& sums) {
  const __m512 by = _mm512_set1_ps(step);
  for (int64_t row = 0; row < rows; row += 2) {
    __m512 means[2], inner[2], scales[2];
    for (int r = 0; r < 2; ++r) {
      const float* from = d + (row + r) * d_row;
      const auto* normed = inside.normed + (row + r) * width;
      __m512 plain = _mm512_setzero_ps(), along = _mm512_setzero_ps();
      for (int64_t i = 0; i < width; i += kLanes) {
        const __m512 g = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_loadu_ps(net.gain + i));
        plain = _mm512_add_ps(plain, g);
        along = _mm512_fmadd_ps(g, E::load(normed + i), along);
      }
      means[r] = _mm512_set1_ps(_mm512_reduce_add_ps(plain) / static_cast<float>(width));
      inner[r] = _mm512_set1_ps(_mm512_reduce_add_ps(along) / static_cast<float>(width));
      scales[r] = _mm512_set1_ps(inside.scales[row + r] * step);
    }
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 gain = _mm512_loadu_ps(net.gain + i);
      __m512 bias = _mm512_loadu_ps(sums.out_bias + i);
      __m512 d_gain = _mm512_loadu_ps(sums.gain + i), d_shift = _mm512_loadu_ps(sums.shift + i);
      __m512 result[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const __m512 here = _mm512_loadu_ps(d + (row + r) * d_row + i);
        const __m512 normed = E::load(inside.normed + (row + r) * width + i);
        const __m512 centred = _mm512_fmsub_ps(here, gain, means[r]);
        result[r] = _mm512_mul_ps(scales[r], _mm512_fnmadd_ps(normed, inner[r], centred));
        E::store(rounded + (row + r) * width + i, result[r]);
        const __m512 scaled = _mm512_mul_ps(by, here);
        d_shift = _mm512_add_ps(d_shift, scaled);
        d_gain = _mm512_fmadd_ps(scaled, normed, d_gain);
        bias = _mm512_add_ps(bias, result[r]);
      }
      E::store_rows(panels.at(i, unit + row / E::kUnit), kPanel, result[0], result[1]);
      _mm512_storeu_ps(sums.out_bias + i, bias);
      _mm512_storeu_ps(sums.gain + i, d_gain);
      _mm512_storeu_ps(sums.shift + i, d_shift);
    }
  }
}

// Rows `width` wide, from places `row` apart, as panels from `unit` on.
template <class E>
AVX512 void to_panels(const typename E::Stored* from, int64_t row, int64_t rows, int64_t width, const Panels& out,
                      int64_t unit) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const auto* place = from + r * row + i;
      E::store_rows(out.at(i, unit + r / E::kUnit), kPanel, E::load(place), E::load(place + row));
    }
  }
}

template <class E>
AVX512 void from_panels(const Panels& from, int64_t unit, int64_t rows, int64_t width, typename E::Stored* out,
                        int64_t row) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t i = 0; i < width; i += kLanes) {
      __m512 a, b;
      E::load_rows(from.at(i, unit + r / E::kUnit), kPanel, a, b);
      E::store(out + r * row + i, a);
      E::store(out + (r + 1) * row + i, b);
    }
  }
}

// total += sums; the sums also rounded, by rows and by panels.
template <class E>
AVX512 void round_sums(const float* sums, int64_t rows, int64_t width, float* total, typename E::Stored* rounded,
                       const Panels& panels, int64_t unit) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t i = 0; i < width; i += kLanes) {
      __m512 x[2];
      for (int j = 0; j < 2; ++j) {
        const int64_t place = (r + j) * width + i;
        x[j] = _mm512_loadu_ps(sums + place);
        if (total != nullptr) _mm512_storeu_ps(total + place, _mm512_add_ps(_mm512_loadu_ps(total + place), x[j]));
        E::store(rounded + place, x[j]);
      }
      E::store_rows(panels.at(i, unit + r / E::kUnit), kPanel, x[0], x[1]);
    }
  }
}

}  // namespace vector_latent_update
