// What Python hands to the native step: one row of addresses per tensor, and scalars that may lie in memory.
// The meaning is in trm_fast/ops/adaptive_step.py; the order of the columns is COLUMNS in
// trm_fast/ops/_adaptive_tensors.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace adaptive_step {

enum Rule : int64_t { kAdamW = 0, kAdam = 1, kATan2 = 2, kSgd = 3, kMomentum = 4, kFilter = 5 };
enum Filter : int64_t { kNone = 0, kEma = 1, kHighpass = 2, kProjection = 3, kCosineGate = 4, kMa = 5 };

// Addresses are 0 where the call has no such state; so is that of an empty tensor, so ask the counters.
struct Row {
  int64_t param, grad, exp_avg, exp_avg_sq, grok_exp_avg, weight_ema, grok_ring, sums, step, grok_step;
  int64_t size, window;
  int64_t param_dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype, grok_exp_avg_dtype, weight_ema_dtype,
      grok_ring_dtype;
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

// A scalar that lies in memory, float32, because the host must not wait for it; null where absent.
inline const float* address(const std::optional<torch::stable::Tensor>& scalar) {
  return scalar ? scalar->const_data_ptr<float>() : nullptr;
}

}  // namespace adaptive_step
