// The meaning is in trm_fast/ops/adaptive_step.py.
//
// A block of threads works through one chunk of one tensor; the addresses of all tensors travel in the arguments of the
// launch, so nothing is copied and a CUDA graph may replay it. The last block to finish moves the step counters on.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cmath>

#include "adaptive_step/math.h"
#include "adaptive_step/table.h"

using torch::stable::Tensor;

namespace {
using namespace adaptive_step;

constexpr int kThreads = 256;
constexpr int kVector = 4;  // 16 bytes of float32 per thread and load
constexpr int64_t kSmallestChunk = kThreads * kVector;
constexpr int64_t kLargestChunk = 65536;
constexpr int64_t kChunksPerProcessor = 8;     // enough to even out the load, few enough to share the look-up
constexpr int kFewRows = 36, kManyRows = 320;  // the arguments of a launch hold 4 KB, of a longer one 32,764 B

// A row of the table with its dtypes in one word, two bits each.
struct DeviceRow {
  int64_t param, grad, exp_avg, exp_avg_sq, grok_exp_avg, weight_ema, step, grok_step, size;
  uint32_t dtypes;
  bool wide;  // every array starts at a multiple of 16 bytes
};
enum Array { kParam = 0, kGrad = 1, kExpAvg = 2, kExpAvgSq = 3, kGrokExpAvg = 4, kWeightEma = 5 };

struct DeviceSettings {
  struct {
    const float *lr, *weight_decay, *lamb, *grad_scale, *found_inf, *clip;
  } at;
  int rule, filter;
  float lr, log_beta1, keep1, beta2, log_beta2, keep2, eps, weight_decay, alpha, fresh, lamb, sign, ema_fresh;
  int64_t after_step;
};

template <int kRows>
struct Launch {
  DeviceRow rows[kRows];
  int first[kRows + 1];  // number of blocks before each row
  int count;
  int64_t chunk;
  DeviceSettings settings;
  int* ticket;
};

static_assert(sizeof(Launch<kFewRows>) <= 4096 && sizeof(Launch<kManyRows>) <= 32764);

// What one tensor needs at one step.
struct Plan {
  bool filtering, seeding;
  float factor, alpha, fresh, lamb, l2, decay, pace, debias;
  uint32_t step;
};

__device__ float value(float number, const float* at) { return at == nullptr ? number : *at; }

__device__ Plan make_plan(const DeviceRow& row, const DeviceSettings& s) {
  const float step = *reinterpret_cast<const float*>(row.step) + 1;
  const float lr = value(s.lr, s.at.lr), weight_decay = value(s.weight_decay, s.at.weight_decay);
  const bool filtering = s.filter != kNone && row.grok_step != 0 && step > static_cast<float>(s.after_step);
  Plan plan;
  plan.filtering = filtering;
  plan.factor = s.sign / value(1.0f, s.at.grad_scale) * value(1.0f, s.at.clip);
  plan.seeding = filtering && *reinterpret_cast<const float*>(row.grok_step) == 0;
  plan.alpha = s.alpha;
  plan.fresh = s.fresh;
  plan.lamb = value(s.lamb, s.at.lamb);
  plan.l2 = s.rule == kAdam ? weight_decay : 0.0f;
  plan.decay = s.rule == kAdam ? 1.0f : 1.0f - lr * weight_decay;
  plan.pace = lr / -expm1f(step * s.log_beta1);
  plan.debias = rsqrtf(-expm1f(step * s.log_beta2));
  plan.step = static_cast<uint32_t>(step);
  return plan;
}

__device__ int dtype_of(const DeviceRow& row, Array array) { return (row.dtypes >> (2 * array)) & 3; }

__device__ float widen(uint16_t bits, int dtype) {
  if (dtype == kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

__device__ uint16_t narrow_bfloat16(float x, uint32_t added) {
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (__float_as_uint(x) + added) >> 16);
}

__device__ uint16_t narrow(float x, int dtype) {
  const uint32_t half = 0x7fff + ((__float_as_uint(x) >> 16) & 1);
  return dtype == kBFloat16 ? narrow_bfloat16(x, half) : __half_as_ushort(__float2half_rn(x));
}

template <int kWidth, class Element>
struct alignas(kWidth * sizeof(Element)) Pack {
  Element at[kWidth];
};

// kWidth consecutive values of one array. kPlain promises float32, so that no branch stands between the loads.
template <int kWidth, bool kPlain>
struct Values {
  float at[kWidth];

  __device__ void load(int64_t address, int64_t i, int dtype) {
    if (kPlain || dtype == kFloat32) {
      const auto pack = reinterpret_cast<const Pack<kWidth, float>*>(address)[i / kWidth];
      for (int k = 0; k < kWidth; ++k) at[k] = pack.at[k];
    } else if constexpr (!kPlain) {
      const auto pack = reinterpret_cast<const Pack<kWidth, uint16_t>*>(address)[i / kWidth];
      for (int k = 0; k < kWidth; ++k) at[k] = widen(pack.at[k], dtype);
    }
  }

  // Stores a parameter, rounded to nearest, or, given random words, a state.
  __device__ void store(int64_t address, int64_t i, int dtype, const uint32_t* words, int shift) const {
    if (kPlain || dtype == kFloat32) {
      Pack<kWidth, float> pack;
      for (int k = 0; k < kWidth; ++k) pack.at[k] = at[k];
      reinterpret_cast<Pack<kWidth, float>*>(address)[i / kWidth] = pack;
    } else if constexpr (!kPlain) {
      Pack<kWidth, uint16_t> pack;
      for (int k = 0; k < kWidth; ++k) {
        pack.at[k] = words == nullptr ? narrow(at[k], dtype) : narrow_bfloat16(at[k], (words[k] >> shift) & 0xffff);
      }
      reinterpret_cast<Pack<kWidth, uint16_t>*>(address)[i / kWidth] = pack;
    }
  }
};

template <int kWidth>
__device__ void random_words(uint32_t (&words)[kWidth], uint32_t step, int64_t i, uint32_t lane) {
  const uint32_t key = random_key(step, static_cast<uint32_t>(i >> 32), lane);
  for (int k = 0; k < kWidth; ++k) words[k] = mix(key ^ static_cast<uint32_t>(i + k));
}

template <int kWidth, bool kPlain>
__device__ void step_values(const DeviceRow& row, const Plan& plan, const DeviceSettings& s, int64_t i) {
  Values<kWidth, kPlain> p, g, m, v, mu, e;
  p.load(row.param, i, dtype_of(row, kParam));
  g.load(row.grad, i, dtype_of(row, kGrad));
  m.load(row.exp_avg, i, dtype_of(row, kExpAvg));
  v.load(row.exp_avg_sq, i, dtype_of(row, kExpAvgSq));
  if (plan.filtering) mu.load(row.grok_exp_avg, i, dtype_of(row, kGrokExpAvg));
  if (row.weight_ema != 0) e.load(row.weight_ema, i, dtype_of(row, kWeightEma));

  for (int k = 0; k < kWidth; ++k) {
    float x = g.at[k] * plan.factor;
    if (plan.filtering) {
      mu.at[k] = plan.seeding ? x : plan.alpha * mu.at[k] + plan.fresh * x;
      x += plan.lamb * (s.filter == kEma ? mu.at[k] : x - mu.at[k]);
    }
    x += plan.l2 * p.at[k];
    m.at[k] += s.keep1 * (x - m.at[k]);
    v.at[k] = s.beta2 * v.at[k] + s.keep2 * x * x;
    const float vhat = sqrtf(v.at[k]) * plan.debias;
    const float update =
        s.rule == kATan2 ? plan.pace * atan2_right(m.at[k], vhat) : plan.pace * m.at[k] / (vhat + s.eps);
    if (plan.step == 1) e.at[k] = p.at[k];  // used only where an average is kept
    p.at[k] = plan.decay * p.at[k] - update;
    if (row.weight_ema != 0) e.at[k] += s.ema_fresh * (p.at[k] - e.at[k]);
  }

  uint32_t first[kWidth], second[kWidth];
  if constexpr (!kPlain) {
    random_words(first, plan.step, i, 0);
    random_words(second, plan.step, i, 1);
  }
  p.store(row.param, i, dtype_of(row, kParam), nullptr, 0);
  m.store(row.exp_avg, i, dtype_of(row, kExpAvg), first, 0);
  v.store(row.exp_avg_sq, i, dtype_of(row, kExpAvgSq), second, 0);
  if (plan.filtering) mu.store(row.grok_exp_avg, i, dtype_of(row, kGrokExpAvg), first, 16);
  if (row.weight_ema != 0) e.store(row.weight_ema, i, dtype_of(row, kWeightEma), second, 16);
}

template <bool kPlain>
__device__ void step_chunk(const DeviceRow& row, const Plan& plan, const DeviceSettings& s, int64_t begin,
                           int64_t end) {
  const int64_t wide_end = row.wide ? begin + (end - begin) / kVector * kVector : begin;
  for (int64_t i = begin + threadIdx.x * kVector; i < wide_end; i += kThreads * kVector) {
    step_values<kVector, kPlain>(row, plan, s, i);
  }
  for (int64_t i = wide_end + threadIdx.x; i < end; i += kThreads) step_values<1, kPlain>(row, plan, s, i);
}

// Every block has read its counters before the last one writes them.
template <int kRows>
__device__ void count_steps(const Launch<kRows>& launch) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(launch.ticket, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!last) return;
  for (int r = threadIdx.x; r < launch.count; r += kThreads) {
    const DeviceRow& row = launch.rows[r];
    float* step = reinterpret_cast<float*>(row.step);
    *step += 1;
    const bool filtered = launch.settings.filter != kNone && row.grok_step != 0;
    if (filtered && *step > static_cast<float>(launch.settings.after_step)) {
      *reinterpret_cast<float*>(row.grok_step) += 1;
    }
  }
  if (threadIdx.x == 0) *launch.ticket = 0;
}

template <int kRows, bool kPlain>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Launch<kRows> launch) {
  const DeviceSettings& s = launch.settings;
  if (s.at.found_inf != nullptr && *s.at.found_inf != 0) return;
  __shared__ Plan plan;
  int low = 0, high = launch.count;  // the row whose blocks hold this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (static_cast<int>(blockIdx.x) >= launch.first[middle] ? low : high) = middle;
  }
  const DeviceRow& row = launch.rows[low];
  if (threadIdx.x == 0) plan = make_plan(row, s);
  __syncthreads();
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first[low]) * launch.chunk;
  step_chunk<kPlain>(row, plan, s, begin, min(begin + launch.chunk, row.size));
  count_steps(launch);
}

DeviceRow device_row(const Row& row) {
  const int64_t dtypes[] = {row.param_dtype,      row.grad_dtype,         row.exp_avg_dtype,
                            row.exp_avg_sq_dtype, row.grok_exp_avg_dtype, row.weight_ema_dtype};
  uint32_t packed = 0;
  for (int array = 0; array < 6; ++array) packed |= static_cast<uint32_t>(dtypes[array]) << (2 * array);
  const int64_t addresses = row.param | row.grad | row.exp_avg | row.exp_avg_sq | row.grok_exp_avg | row.weight_ema;
  return {row.param, row.grad,      row.exp_avg, row.exp_avg_sq, row.grok_exp_avg,   row.weight_ema,
          row.step,  row.grok_step, row.size,    packed,         addresses % 16 == 0};
}

int64_t chunk_size(int64_t elements, int processors) {
  int64_t chunk = kSmallestChunk;
  while (chunk < kLargestChunk && chunk * kChunksPerProcessor * processors < elements) chunk *= 2;
  return chunk;
}

template <int kRows>
void launch_rows(const Row* rows, int64_t count, int64_t chunk, const DeviceSettings& settings, int* ticket,
                 cudaStream_t stream) {
  Launch<kRows> launch;
  launch.count = static_cast<int>(count);
  launch.chunk = chunk;
  launch.settings = settings;
  launch.ticket = ticket;
  launch.first[0] = 0;
  bool plain = true;
  for (int64_t r = 0; r < count; ++r) {
    launch.rows[r] = device_row(rows[r]);
    plain = plain && launch.rows[r].dtypes == 0;
    // An empty tensor gets a block too, because its step counts.
    launch.first[r + 1] = launch.first[r] + static_cast<int>(std::max<int64_t>(1, (rows[r].size + chunk - 1) / chunk));
  }
  const int blocks = launch.first[count];
  if (plain) {
    step_kernel<kRows, true><<<blocks, kThreads, 0, stream>>>(launch);
  } else {
    step_kernel<kRows, false><<<blocks, kThreads, 0, stream>>>(launch);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void adaptive_step_rows(Tensor table, std::optional<Tensor> ticket, int64_t rule, int64_t filter, double lr,
                        double beta1, double beta2, double eps, double weight_decay, double alpha, double lamb,
                        int64_t after_step, bool maximize, double weight_ema, std::optional<Tensor> lr_at,
                        std::optional<Tensor> weight_decay_at, std::optional<Tensor> lamb_at,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip) {
  STD_TORCH_CHECK(table.size(1) == kColumns, "adaptive_step: the table must have ", kColumns, " columns");
  const int64_t tensors = table.size(0);
  if (tensors == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(ticket->get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(ticket->get_device_index(), &stream));
  int processors = 1;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ticket->get_device_index()));

  DeviceSettings s;
  s.at = {address(lr_at),      address(weight_decay_at), address(lamb_at),
          address(grad_scale), address(found_inf),       address(clip)};
  s.rule = static_cast<int>(rule);
  s.filter = static_cast<int>(filter);
  s.lr = static_cast<float>(lr);
  s.log_beta1 = static_cast<float>(std::log(beta1));
  s.keep1 = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.log_beta2 = static_cast<float>(std::log(beta2));
  s.keep2 = static_cast<float>(1.0 - beta2);
  s.eps = static_cast<float>(eps);
  s.weight_decay = static_cast<float>(weight_decay);
  s.alpha = static_cast<float>(alpha);
  s.fresh = static_cast<float>(1.0 - alpha);
  s.lamb = static_cast<float>(lamb);
  s.sign = maximize ? -1.0f : 1.0f;
  s.ema_fresh = static_cast<float>(1.0 - weight_ema);
  s.after_step = after_step;

  const Row* rows = static_cast<const Row*>(table.data_ptr());
  int64_t elements = 0;
  for (int64_t r = 0; r < tensors; ++r) elements += rows[r].size;
  const int64_t chunk = chunk_size(elements, processors);
  int* counter = ticket->mutable_data_ptr<int>();
  for (int64_t r = 0; r < tensors; r += kManyRows) {
    const int64_t count = std::min<int64_t>(kManyRows, tensors - r);
    const auto launch = count <= kFewRows ? launch_rows<kFewRows> : launch_rows<kManyRows>;
    launch(rows + r, count, chunk, s, counter, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CUDA, m) { m.impl("adaptive_step_rows_", TORCH_BOX(&adaptive_step_rows)); }
