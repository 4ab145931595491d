// What Python hands to the native sums: one row per tensor. The meaning is in trm_fast/ops/filter_sums.py, as is the
// order of the columns.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "common/checks.h"
#include "common/dtypes.h"

namespace filter_sums {

// The mean is 0 where only squares are wanted.
struct Row {
  int64_t grad, mean, sums, size, grad_dtype, mean_dtype;

  bool fits() const {
    return size >= 0 && sums != 0 && trm_fast::is_array(grad, grad_dtype, trm_fast::kFloat16, size > 0) &&
           trm_fast::is_array(mean, mean_dtype, trm_fast::kFloat16, false);
  }
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

// Returns the rows of a table, checked.
inline const Row* rows_of(const torch::stable::Tensor& table) {
  STD_TORCH_CHECK(trm_fast::is_table(table, kColumns), "filter_sums: the table must have ", kColumns,
                  " columns of int64 side by side");
  const Row* rows = static_cast<const Row*>(table.data_ptr());
  for (int64_t r = 0; r < table.size(0); ++r) {
    STD_TORCH_CHECK(rows[r].fits(), "filter_sums: row ", r, " of the table must hold a size, addresses and dtypes");
  }
  return rows;
}

}  // namespace filter_sums
