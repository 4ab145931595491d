// The exact gelu, x Phi(x) with the normal distribution Phi, and its slope.
#pragma once

#include "common/elements.h"

namespace vector_latent_update {

using namespace panel;

// Phi(x) = 1/2 + x P(t), t = x^2 scale - 1, fitted for the least absolute error up to t = 1. Beyond that t stands
// still, so that x P(t) soon leaves [-1/2, 1/2] and Phi is exactly 0 or 1. Highest power first.
template <class E>
struct Fit;

template <>
struct Fit<Float32> {  // |x| <= 5.4, error 3e-8 and with all roundings 1.2e-7
  static constexpr float kScale = 2.0f / (5.4f * 5.4f);
  static constexpr float kTerms[] = {3.92854825e-4f, -1.02836778e-3f, 8.74946767e-4f, -1.18641346e-3f,
                                     3.65890563e-3f, -6.71533495e-3f, 9.65120643e-3f, -1.39633222e-2f,
                                     1.96451414e-2f, -2.57464573e-2f, 3.21165957e-2f, -3.9206814e-2f,
                                     4.84995916e-2f, -6.53280541e-2f, 1.30928114e-1f};
};

template <>
struct Fit<BFloat16> {  // |x| <= 3.9, error 5e-5, far below a rounding to bfloat16
  static constexpr float kScale = 2.0f / (3.9f * 3.9f);
  static constexpr float kTerms[] = {-2.67414353e-3f, 7.29460502e-3f, -1.13355629e-2f, 1.99955143e-2f,
                                     -3.5637021e-2f,  5.59900925e-2f, -8.56936127e-2f, 1.80248842e-1f};
};

template <class E>
AVX512 inline __m512 normal_distribution(__m512 x) {
  const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 t = _mm512_min_ps(_mm512_fmsub_ps(square, _mm512_set1_ps(Fit<E>::kScale), one), one);
  __m512 p = zero;
#pragma GCC unroll 16
  for (const float term : Fit<E>::kTerms) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(term));
  return _mm512_min_ps(_mm512_max_ps(_mm512_fmadd_ps(x, p, _mm512_set1_ps(0.5f)), zero), one);
}

// d gelu / dx = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
template <class E>
AVX512 inline __m512 gelu_slope(__m512 x, __m512 phi) {
  const __m512 power = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * kLog2E));
  const __m512 density = _mm512_mul_ps(exp2<E>(power), _mm512_set1_ps(0.398942280f));
  return _mm512_fmadd_ps(x, density, phi);
}

}  // namespace vector_latent_update
