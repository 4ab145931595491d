// What native code asks of tensors before it reads them by address: schemas forbid no size, stride or dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace trm_fast {

// The product of sizes or counts; -1, which no tensor has, where it is too large or one of them is negative.
inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t all = 1;
  for (int64_t factor : factors) {
    if (factor < 0 || __builtin_mul_overflow(all, factor, &all)) return -1;
  }
  return all;
}

inline bool is_plain(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type,
                     std::initializer_list<int64_t> sizes) {
  if (tensor.scalar_type() != type || tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t dim = 0;
  for (int64_t size : sizes) {
    if (tensor.size(dim++) != size) return false;
  }
  return tensor.is_contiguous();
}

// The same where only the number of elements matters.
inline bool is_flat(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type, int64_t elements) {
  return tensor.scalar_type() == type && tensor.numel() == elements && tensor.is_contiguous();
}

// A table of addresses: rows of int64 that the host reads.
inline bool is_table(const torch::stable::Tensor& tensor, int64_t columns) {
  return tensor.is_cpu() && tensor.dim() == 2 &&
         is_plain(tensor, torch::headeronly::ScalarType::Long, {tensor.size(0), columns});
}

// Where the tensors of a call lie, which are contiguous.
class Memory {
 public:
  void reads(const torch::stable::Tensor& tensor) { add(tensor, false); }
  void writes(const torch::stable::Tensor& tensor) { add(tensor, true); }
  void reads(const std::optional<torch::stable::Tensor>& tensor) {
    if (tensor) add(*tensor, false);
  }
  void writes(const std::optional<torch::stable::Tensor>& tensor) {
    if (tensor) add(*tensor, true);
  }
  void reads(const std::vector<torch::stable::Tensor>& tensors) {
    for (const auto& tensor : tensors) add(tensor, false);
  }
  void writes(const std::vector<torch::stable::Tensor>& tensors) {
    for (const auto& tensor : tensors) add(tensor, true);
  }

  // Whether nothing that is written is part of another tensor.
  bool is_disjoint() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    uintptr_t end = 0, written_end = 0;
    for (const Span& span : spans_) {
      if (span.begin < (span.is_written ? end : written_end)) return false;
      end = std::max(end, span.end);
      if (span.is_written) written_end = std::max(written_end, span.end);
    }
    return true;
  }

 private:
  struct Span {
    uintptr_t begin, end;
    bool is_written;
  };

  void add(const torch::stable::Tensor& tensor, bool is_written) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    const uintptr_t bytes = tensor.numel() * tensor.element_size();
    if (bytes > 0) spans_.push_back({begin, begin + bytes, is_written});
  }

  std::vector<Span> spans_;
};

}  // namespace trm_fast
