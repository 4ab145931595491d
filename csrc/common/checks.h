// What native code asks of tensors before it reads them by address: schemas forbid no size, stride or dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

namespace trm_fast {

inline bool is_plain(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type,
                     std::initializer_list<int64_t> sizes) {
  if (tensor.scalar_type() != type || tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t dim = 0;
  for (int64_t size : sizes) {
    if (tensor.size(dim++) != size) return false;
  }
  return tensor.is_contiguous();
}

// A table of addresses: rows of int64.
inline bool is_table(const torch::stable::Tensor& tensor, int64_t columns) {
  return tensor.dim() == 2 && is_plain(tensor, torch::headeronly::ScalarType::Long, {tensor.size(0), columns});
}

}  // namespace trm_fast
