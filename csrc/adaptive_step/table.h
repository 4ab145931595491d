// What Python hands to the native step: one row of addresses per tensor.
// The meaning is in trm_fast/ops/adaptive_step.py; the order of the columns is COLUMNS in
// trm_fast/ops/_adaptive_tensors.py.
#pragma once

#include <cstdint>

namespace adaptive_step {

// Addresses are 0 where the call has no such state; so is that of an empty tensor, so ask the counters.
struct Row {
  int64_t param, grad, exp_avg, exp_avg_sq, grok_exp_avg, weight_ema, grok_ring, sums, step, grok_step;
  int64_t size, window;
  int64_t param_dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype, grok_exp_avg_dtype, weight_ema_dtype,
      grok_ring_dtype;
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

}  // namespace adaptive_step
