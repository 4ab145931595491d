// What float32 and bfloat16 differ in, so that everything else is written once: how 16 values are loaded and stored,
// and the unit of a product, which is one float32 or a pair of bfloat16 along the summed side. A unit is a word of 4
// bytes either way. Sums, norms and activations are float32.
#pragma once

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 blames its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

namespace panel {

constexpr int64_t kLanes = 16;

AVX512 inline __mmask16 lanes(int64_t size) {
  return size >= kLanes ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << (size > 0 ? size : 0)) - 1);
}

struct Float32 {
  using Stored = float;
  static constexpr int64_t kUnit = 1;  // values in a word

  AVX512 static __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  AVX512 static __m512 load(const float* place) { return _mm512_loadu_ps(place); }
  AVX512 static __m512 load(const float* place, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, place); }
  AVX512 static void store(float* place, __m512 x) { _mm512_storeu_ps(place, x); }
  AVX512 static void store(float* place, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(place, mask, x); }
  AVX512 static __m512 round(__m512 x) { return x; }

  // Two rows of a panel whose width is `width` words.
  AVX512 static void store_rows(uint32_t* place, int64_t width, __m512 a, __m512 b) {
    _mm512_storeu_ps(place, a);
    _mm512_storeu_ps(place + width, b);
  }
  AVX512 static void load_rows(const uint32_t* place, int64_t width, __m512& a, __m512& b) {
    a = _mm512_loadu_ps(place);
    b = _mm512_loadu_ps(place + width);
  }

  // 2^f for |f| <= 1/2, relative error 2e-9 before rounding: a polynomial fitted for the least relative error.
  AVX512 static __m512 exp2_fraction(__m512 f) {
    __m512 p = _mm512_set1_ps(1.5345811e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3399931e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618489e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503288e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226469e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147206e-1f));
    return _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  }
  AVX512 static __m512 reciprocal(__m512 x) { return _mm512_div_ps(_mm512_set1_ps(1.0f), x); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static constexpr int64_t kUnit = 2;

  AVX512 static __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  AVX512 static __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  AVX512 static __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
  AVX512 static __m512 load(const uint16_t* place) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
  }
  AVX512 static __m512 load(const uint16_t* place, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, place));
  }
  AVX512 static void store(uint16_t* place, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), narrow(x));
  }
  AVX512 static void store(uint16_t* place, __m512 x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(place, mask, narrow(x));
  }
  AVX512 static __m512 round(__m512 x) { return widen(narrow(x)); }

  AVX512 static __m512i pairs(__m512 a, __m512 b) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(a)), high = _mm512_cvtepu16_epi32(narrow(b));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  AVX512 static void store_rows(uint32_t* place, int64_t, __m512 a, __m512 b) {
    _mm512_storeu_si512(place, pairs(a, b));
  }
  AVX512 static void load_rows(const uint32_t* place, int64_t, __m512& a, __m512& b) {
    const __m512i words = _mm512_loadu_si512(place);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  // Relative error 3e-6, far below a rounding to bfloat16.
  AVX512 static __m512 exp2_fraction(__m512 f) {
    __m512 p = _mm512_set1_ps(9.5701006e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.591786e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40247449e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93121815e-1f));
    return _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99999261e-1f));
  }
  AVX512 static __m512 reciprocal(__m512 x) { return _mm512_rcp14_ps(x); }
};

// 2^x, which stays finite and above zero.
template <class E>
AVX512 inline __m512 exp2(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-126.0f)), _mm512_set1_ps(126.0f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(E::exp2_fraction(_mm512_sub_ps(x, whole)), whole);
}

constexpr float kLog2E = 1.44269504f;

template <class E>
AVX512 inline __m512 sigmoid(__m512 x) {
  const __m512 e = exp2<E>(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)));
  return E::reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

}  // namespace panel
