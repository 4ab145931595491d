// Arrays in 16 bits as float32, in buffers that stay in the first-level cache.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "common/dtypes.h"
#include "common/per_cpu.h"

namespace trm_fast {

struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

namespace {

PER_CPU void widen_bfloat16(float* __restrict__ out, const BFloat16* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = widen(in[i]);
}

PER_CPU void widen_float16(float* __restrict__ out, const uint16_t* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(in[i]);
}

inline char* place(int64_t address, int64_t dtype, int64_t first) {
  return reinterpret_cast<char*>(address) + first * (dtype == kFloat32 ? 4 : 2);
}

// Part of an array as float32: where it lies, or widened into a buffer.
inline float* load(int64_t address, int64_t dtype, int64_t first, int64_t size, float* buffer) {
  char* data = place(address, dtype, first);
  if (dtype == kFloat32) return reinterpret_cast<float*>(data);
  if (dtype == kBFloat16) widen_bfloat16(buffer, reinterpret_cast<BFloat16*>(data), size);
  if (dtype == kFloat16) widen_float16(buffer, reinterpret_cast<uint16_t*>(data), size);
  return buffer;
}

}  // namespace
}  // namespace trm_fast
