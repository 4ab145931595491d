// How tensors are cut into chunks, each of which a block of threads works through.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>

namespace trm_fast {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // 16 bytes of float32 per thread and load
constexpr int64_t kSmallestChunk = kThreads * kVector;
constexpr int64_t kLargestChunk = 65536;
constexpr int64_t kChunksPerProcessor = 8;  // enough to even out the load, few enough to share the look-up

inline int64_t chunk_size(int64_t elements, int32_t device) {
  int processors = 1;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  int64_t chunk = kSmallestChunk;
  while (chunk < kLargestChunk && chunk * kChunksPerProcessor * processors < elements) chunk *= 2;
  return chunk;
}

// An empty tensor gets a block too.
inline int blocks_of(int64_t size, int64_t chunk) {
  return static_cast<int>(std::max<int64_t>(1, (size + chunk - 1) / chunk));
}

// The row to which this block belongs; `first` holds the number of blocks before each row.
__device__ inline int row_of_block(const int* first, int count) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (static_cast<int>(blockIdx.x) >= first[middle] ? low : high) = middle;
  }
  return low;
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace trm_fast
