// Scalar functions that the CPU and the CUDA step share.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "adaptive_step/settings.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace adaptive_step {

// A 32-bit mixing function (constants: C. Wellons, hash-prospector, "lowbias32").
HOST_DEVICE uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

// Key of the random bits of elements [high * 2^32, (high + 1) * 2^32) at one step; odd lanes serve the second pair.
HOST_DEVICE uint32_t random_key(uint32_t step, uint32_t high, uint32_t lane) {
  return mix(step + 0x9e3779b9u * (2 * high + lane));
}

// atan2(y, x) for x >= 0 within 4 ulp: a minimax polynomial in r^2 on [0, 1] (relative error 1.5e-8), reflected above.
HOST_DEVICE float atan2_right(float y, float x) {
  const float tall = std::fabs(y);
  const float small = tall < x ? tall : x, large = tall < x ? x : tall;
  const float diagonal = large > 0 ? 1.0f : 0.0f;  // also where both are infinite
  const float r = small == large ? diagonal : small / large;
  const float z = r * r;
  float sum = 0.002849886892f;
  sum = sum * z - 0.01606861502f;
  sum = sum * z + 0.04269149154f;
  sum = sum * z - 0.07504291832f;
  sum = sum * z + 0.1064093262f;
  sum = sum * z - 0.1420364380f;
  sum = sum * z + 0.1999261975f;
  sum = sum * z - 0.3333307207f;
  sum = sum * z * r + r;
  const float angle = tall > x ? 1.57079633f - sum : sum;
  return y < 0 ? -angle : angle;
}

// What a filter multiplies the gradient and its mean by.
struct Blend {
  float gain, pull;
};

// From sums over the gradient as it is and the mean before this step: g.mu, ||g||^2, ||mu||^2. `factor` is about to be
// applied to the gradient, and the mean is about to move by alpha.
HOST_DEVICE Blend blend_by_sums(bool projects, const double* sums, double factor, double alpha, double lamb,
                                double proj_eps) {
  const double fresh = 1.0 - alpha, dot = sums[0] * factor, square = sums[1] * factor * factor;
  const double mean_square = alpha * alpha * sums[2] + 2.0 * alpha * fresh * dot + fresh * fresh * square;
  const double new_dot = alpha * dot + fresh * square;
  if (projects) return {1.0f, static_cast<float>(mean_square > proj_eps ? lamb * new_dot / mean_square : 0.0)};
  return {static_cast<float>(new_dot > 0.5 * std::sqrt(square * mean_square) ? lamb : 1.0 / lamb), 0.0f};
}

// What a filter looks at beside its numbers, for one tensor at one step.
struct Seen {
  double lamb;         // that of the numbers, or read from memory
  double factor;       // of the gradient
  double step;         // t
  int64_t filtered;    // steps that the filter has taken
  int64_t window;      // slots of the ring
  const double* sums;  // over gradient and mean
};

// What the filter multiplies the gradient by, and its mean or the sum of its ring.
HOST_DEVICE Blend blend(Filter filter, const Numbers& number, const Seen& seen) {
  switch (filter) {
    case kNone:
      return {1.0f, 0.0f};
    case kEma:
      return {1.0f, static_cast<float>(seen.lamb)};
    case kHighpass:
      return {static_cast<float>(1.0 + seen.lamb), static_cast<float>(-seen.lamb)};
    case kProjection:
    case kCosineGate: {
      const double alpha = seen.filtered == 0 ? 0.0 : number.alpha;
      return blend_by_sums(filter == kProjection, seen.sums, seen.factor, alpha, seen.lamb, number.proj_eps);
    }
    case kMa: {
      const int64_t known = seen.filtered + 1 < seen.window ? seen.filtered + 1 : seen.window;
      const bool amplified = seen.step > number.after_step && !(number.warmup != 0 && known < seen.window);
      return {1.0f, static_cast<float>(amplified ? seen.lamb / known : 0.0)};
    }
  }
#ifdef __CUDA_ARCH__
  __trap();
#else
  throw std::logic_error("adaptive_step: there is no such filter");
#endif
}

}  // namespace adaptive_step
