// What Python hands to the native sums: one row per tensor. The meaning is in trm_fast/ops/filter_sums.py, as is the
// order of the columns.
#pragma once

#include <cstdint>

namespace filter_sums {

// The mean is 0 where only squares are wanted.
struct Row {
  int64_t grad, mean, sums, size, grad_dtype, mean_dtype;
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

}  // namespace filter_sums
