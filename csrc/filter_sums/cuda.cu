// The meaning is in trm_fast/ops/filter_sums.py.
//
// A block of threads adds up one chunk of one tensor; the addresses of all tensors travel in the arguments of the
// launch. A second launch adds up the chunks of each tensor.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/cuda_chunks.h"
#include "common/cuda_floats.h"
#include "filter_sums/table.h"

using torch::stable::Tensor;

namespace {
using namespace filter_sums;
using namespace trm_fast;

// The same for every call, so that the sums of a tensor depend on nothing else; it is CHUNK of
// trm_fast/ops/filter_sums.py.
constexpr int64_t kChunk = 4096;
constexpr int kFewRows = 88, kManyRows = 720;  // the arguments of a launch hold 4 KB, of a longer one 32,764 B

struct DeviceRow {
  int64_t grad, mean, sums, size;
  int16_t grad_dtype, mean_dtype;
  bool wide;  // both arrays start at a multiple of 16 bytes
};

template <int kRows>
struct Launch {
  DeviceRow rows[kRows];
  int first[kRows + 1];  // number of blocks before each row
  int count;
  double* parts;  // three sums of each block
};

static_assert(sizeof(Launch<kFewRows>) <= 4096 && sizeof(Launch<kManyRows>) <= 32764);

// In each of the kWidth columns: g * mean, g * g and mean * mean.
template <int kWidth>
struct Sums {
  float dot[kWidth] = {}, square[kWidth] = {}, mean_square[kWidth] = {};

  template <bool kPlain>
  __device__ void add(const DeviceRow& row, int64_t i) {
    float g[kWidth], mean[kWidth] = {};
    load_values<kWidth, kPlain>(g, row.grad, i, row.grad_dtype);
    if (row.mean != 0) load_values<kWidth, kPlain>(mean, row.mean, i, row.mean_dtype);
    for (int k = 0; k < kWidth; ++k) {
      dot[k] += g[k] * mean[k];
      square[k] += g[k] * g[k];
      mean_square[k] += mean[k] * mean[k];
    }
  }

  __device__ void add_to(double (&sums)[3]) const {
    for (int k = 0; k < kWidth; ++k) {
      sums[0] += dot[k];
      sums[1] += square[k];
      sums[2] += mean_square[k];
    }
  }
};

// Adds up what the threads of a block hold, and writes it.
__device__ void write_sums(const double (&sums)[3], double* out) {
  __shared__ double held[3][kThreads];
  for (int s = 0; s < 3; ++s) held[s][threadIdx.x] = sums[s];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      for (int s = 0; s < 3; ++s) held[s][threadIdx.x] += held[s][threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < 3; ++s) out[s] = held[s][0];
  }
}

template <int kRows, bool kPlain>
__global__ void __launch_bounds__(kThreads) sum_chunks(const __grid_constant__ Launch<kRows> launch) {
  const int r = row_of_block(launch.first, launch.count);
  const DeviceRow& row = launch.rows[r];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first[r]) * kChunk;
  const int64_t end = min(begin + kChunk, row.size);
  const int64_t wide_end = row.wide ? begin + (end - begin) / kVector * kVector : begin;
  Sums<kVector> wide;
  for (int64_t i = begin + threadIdx.x * kVector; i < wide_end; i += kThreads * kVector) {
    wide.template add<kPlain>(row, i);
  }
  Sums<1> rest;
  for (int64_t i = wide_end + threadIdx.x; i < end; i += kThreads) rest.template add<kPlain>(row, i);
  double sums[3] = {};
  wide.add_to(sums);
  rest.add_to(sums);
  write_sums(sums, launch.parts + 3 * static_cast<int64_t>(blockIdx.x));
}

template <int kRows>
__global__ void __launch_bounds__(kThreads) sum_parts(const __grid_constant__ Launch<kRows> launch) {
  double sums[3] = {};
  for (int part = launch.first[blockIdx.x] + threadIdx.x; part < launch.first[blockIdx.x + 1]; part += kThreads) {
    for (int s = 0; s < 3; ++s) sums[s] += launch.parts[3 * static_cast<int64_t>(part) + s];
  }
  write_sums(sums, reinterpret_cast<double*>(launch.rows[blockIdx.x].sums));
}

DeviceRow device_row(const Row& row) {
  return {row.grad,
          row.mean,
          row.sums,
          row.size,
          static_cast<int16_t>(row.grad_dtype),
          static_cast<int16_t>(row.mean_dtype),
          (row.grad | row.mean) % 16 == 0};
}

template <int kRows>
void launch_rows(const Row* rows, int64_t count, double* parts, cudaStream_t stream) {
  Launch<kRows> launch;
  launch.count = static_cast<int>(count);
  launch.parts = parts;
  launch.first[0] = 0;
  bool plain = true;
  for (int64_t r = 0; r < count; ++r) {
    launch.rows[r] = device_row(rows[r]);
    plain = plain && rows[r].grad_dtype == kFloat32 && rows[r].mean_dtype == kFloat32;
    launch.first[r + 1] = launch.first[r] + blocks_of(rows[r].size, kChunk);
  }
  const auto kernel = plain ? sum_chunks<kRows, true> : sum_chunks<kRows, false>;
  kernel<<<launch.first[count], kThreads, 0, stream>>>(launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_parts<kRows><<<launch.count, kThreads, 0, stream>>>(launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void filter_sums_rows(Tensor table, std::optional<Tensor> scratch) {
  const Row* rows = rows_of(table);
  const int64_t tensors = table.size(0);
  if (tensors == 0) return;
  int64_t blocks = 0;
  for (int64_t r = 0; r < tensors; ++r) blocks += blocks_of(rows[r].size, kChunk);
  STD_TORCH_CHECK(scratch && scratch->is_cuda() && scratch->is_contiguous() && scratch->numel() >= 3 * blocks,
                  "filter_sums: there must be memory of a GPU for three sums of each of ", blocks, " blocks");
  const int32_t device = scratch->get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  double* parts = scratch->mutable_data_ptr<double>();
  // Launches on one stream take turns with the memory of the parts.
  for (int64_t r = 0; r < tensors; r += kManyRows) {
    const int64_t count = std::min<int64_t>(kManyRows, tensors - r);
    const auto launch = count <= kFewRows ? launch_rows<kFewRows> : launch_rows<kManyRows>;
    launch(rows + r, count, parts, current_stream(device));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CUDA, m) { m.impl("filter_sums_rows_", TORCH_BOX(&filter_sums_rows)); }
