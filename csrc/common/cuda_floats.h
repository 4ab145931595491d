// Consecutive values of an array in any storage dtype as float32, in one load of up to 16 bytes.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtypes.h"

namespace trm_fast {

template <int kWidth, class Element>
struct alignas(kWidth * sizeof(Element)) Pack {
  Element at[kWidth];
};

__device__ inline float widen(uint16_t bits, int dtype) {
  if (dtype == kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

// kPlain promises float32, so that no branch stands between the loads.
template <int kWidth, bool kPlain>
__device__ inline void load_values(float (&values)[kWidth], int64_t address, int64_t i, int dtype) {
  if (kPlain || dtype == kFloat32) {
    const auto pack = reinterpret_cast<const Pack<kWidth, float>*>(address)[i / kWidth];
    for (int k = 0; k < kWidth; ++k) values[k] = pack.at[k];
  } else if constexpr (!kPlain) {
    const auto pack = reinterpret_cast<const Pack<kWidth, uint16_t>*>(address)[i / kWidth];
    for (int k = 0; k < kWidth; ++k) values[k] = widen(pack.at[k], dtype);
  }
}

}  // namespace trm_fast
