// The meaning is in trm_fast/ops/filter_sums.py.
//
// All tensors are cut into blocks, which are shared out in one parallel_for. A block is summed in float32 by lanes, the
// blocks of a tensor in double and in order, so that the number of threads changes nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <vector>

#include "common/checks.h"
#include "common/cpu_floats.h"
#include "common/parallel.h"
#include "common/per_cpu.h"
#include "filter_sums/table.h"

using torch::stable::Tensor;

namespace {
using namespace filter_sums;
using namespace trm_fast;

constexpr int64_t kBlock = 2048;
constexpr int64_t kGrain = 8;   // blocks per thread; a fork costs about as much as their work
constexpr int64_t kLanes = 64;  // four registers of 16: an addition takes four cycles

using Sums = std::array<double, 3>;

PER_CPU void sum_squares(const float* __restrict__ g, int64_t size, double* __restrict__ out) {
  float square[kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) square[k] += g[i + k] * g[i + k];
  }
  for (int64_t i = whole; i < size; ++i) square[i - whole] += g[i] * g[i];
  for (int64_t k = 0; k < kLanes; ++k) out[1] += square[k];
}

PER_CPU void sum_products(const float* __restrict__ g, const float* __restrict__ mean, int64_t size,
                          double* __restrict__ out) {
  float dot[kLanes] = {}, square[kLanes] = {}, mean_square[kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      dot[k] += g[i + k] * mean[i + k];
      square[k] += g[i + k] * g[i + k];
      mean_square[k] += mean[i + k] * mean[i + k];
    }
  }
  for (int64_t i = whole; i < size; ++i) {
    dot[i - whole] += g[i] * mean[i];
    square[i - whole] += g[i] * g[i];
    mean_square[i - whole] += mean[i] * mean[i];
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    out[0] += dot[k];
    out[1] += square[k];
    out[2] += mean_square[k];
  }
}

Sums sum_block(const Row& row, int64_t first, int64_t size) {
  alignas(64) float buffers[2][kBlock];
  Sums sums{};
  const float* grad = load(row.grad, row.grad_dtype, first, size, buffers[0]);
  if (row.mean == 0) {
    sum_squares(grad, size, sums.data());
  } else {
    sum_products(grad, load(row.mean, row.mean_dtype, first, size, buffers[1]), size, sums.data());
  }
  return sums;
}

void filter_sums_rows(Tensor table, std::optional<Tensor> scratch) {
  const Row* rows = rows_of(table);
  const int64_t tensors = table.size(0);
  std::vector<int64_t> first(tensors + 1, 0);  // number of blocks before each tensor
  for (int64_t t = 0; t < tensors; ++t) first[t + 1] = first[t] + (rows[t].size + kBlock - 1) / kBlock;
  std::vector<Sums> partial(first[tensors]);
  trm_fast::parallel_for(0, first[tensors], kGrain, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (block >= first[t + 1]) ++t;
      const int64_t offset = (block - first[t]) * kBlock;
      partial[block] = sum_block(rows[t], offset, std::min(kBlock, rows[t].size - offset));
    }
  });
  for (int64_t t = 0; t < tensors; ++t) {
    Sums total{};
    for (int64_t block = first[t]; block < first[t + 1]; ++block) {
      for (int s = 0; s < 3; ++s) total[s] += partial[block][s];
    }
    std::copy(total.begin(), total.end(), reinterpret_cast<double*>(rows[t].sums));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) { m.impl("filter_sums_rows_", TORCH_BOX(&filter_sums_rows)); }
