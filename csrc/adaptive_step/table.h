// What Python hands to the native step: one row of addresses per tensor.
// The meaning is in trm_fast/ops/adaptive_step.py; the order of the columns is COLUMNS in
// trm_fast/ops/_adaptive_tensors.py.
#pragma once

#include <cstdint>
#include <limits>

#include "adaptive_step/settings.h"
#include "common/dtypes.h"

namespace adaptive_step {

// Addresses are 0 where the call has no such state; so is that of an empty tensor, so ask the counters.
struct Row {
  int64_t param, grad, exp_avg, exp_avg_sq, grok_exp_avg, weight_ema, grok_ring, sums, step, grok_step;
  int64_t size, window;
  int64_t param_dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype, grok_exp_avg_dtype, weight_ema_dtype,
      grok_ring_dtype;

  // Whether a step of this rule and filter finds in the row what it needs.
  bool fits(Rule rule, Filter filter) const {
    using namespace trm_fast;
    const Rest rest = rest_of(rule);
    const bool any = size > 0, adaptive = any && (rest == Rest::kDivide || rest == Rest::kAngle);
    const bool filtered = filter != kNone && grok_step != 0, ringed = filtered && filter == kMa;
    const bool reduced = filtered && (filter == kProjection || filter == kCosineGate);
    return size >= 0 && is_array(step, kFloat32, kFloat32, true) && is_array(grok_step, kFloat32, kFloat32, false) &&
           is_array(param, param_dtype, kFloat16, any) && is_array(grad, grad_dtype, kFloat16, any) &&
           is_array(exp_avg, exp_avg_dtype, kBFloat16, adaptive) &&
           is_array(exp_avg_sq, exp_avg_sq_dtype, kBFloat16, adaptive) &&
           is_array(grok_exp_avg, grok_exp_avg_dtype, ringed ? kFloat32 : kBFloat16, any && filtered) &&
           is_array(weight_ema, weight_ema_dtype, kBFloat16, false) &&
           is_array(grok_ring, grok_ring_dtype, kBFloat16, any && ringed) && (sums != 0 || !reduced) && 0 <= window &&
           window <= std::numeric_limits<int32_t>::max() && (window > 0 || !ringed);
  }
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

// Returns the rows of a table, checked.
inline const Row* rows_of(const torch::stable::Tensor& table, const Settings& settings) {
  STD_TORCH_CHECK(trm_fast::is_table(table, kColumns), "adaptive_step: the table must have ", kColumns,
                  " columns of int64 side by side");
  const Row* rows = static_cast<const Row*>(table.data_ptr());
  for (int64_t r = 0; r < table.size(0); ++r) {
    STD_TORCH_CHECK(rows[r].fits(settings.rule, settings.filter), "adaptive_step: row ", r,
                    " of the table must hold sizes, addresses and dtypes of what the rule and the filter need");
  }
  return rows;
}

}  // namespace adaptive_step
