// The meaning is in trm_fast/ops/adaptive_step.py.
//
// A block of threads works through one chunk of one tensor; the addresses of all tensors travel in the arguments of the
// launch, so nothing is copied and a CUDA graph may replay it. The last block to finish moves the step counters on.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "adaptive_step/math.h"
#include "adaptive_step/settings.h"
#include "adaptive_step/table.h"
#include "common/cuda_chunks.h"
#include "common/cuda_floats.h"

using torch::stable::Tensor;

namespace {
using namespace adaptive_step;
using namespace trm_fast;

constexpr int64_t kRingChunk = 1024;           // elements of a ring that are summed anew together
constexpr int kFewRows = 36, kManyRows = 320;  // the arguments of a launch hold 4 KB, of a longer one 32,764 B

// A row of the table with its dtypes in one word, two bits each.
struct DeviceRow {
  int64_t param, grad, exp_avg, exp_avg_sq, grok_exp_avg, weight_ema, grok_ring, sums, step, grok_step, size;
  int32_t window;
  uint16_t dtypes;
  bool wide;  // every array, and every slot of the ring, starts where a wide load may
};
enum Array { kParam, kGrad, kExpAvg, kExpAvgSq, kGrokExpAvg, kWeightEma, kGrokRing };
constexpr int kArrays = 7;

// Numbers that every element needs are rounded once, on the host.
struct DeviceSettings {
  Settings all;
  bool adaptive, output, nesterov;
  float beta1, take1, log_beta1, beta2, log_beta2, keep2, eps, alpha, fresh, ema_fresh;
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
  float factor, alpha, fresh, gain, pull, l2, decay, pace, debias;
  uint32_t step;
  uint32_t filtered;  // steps that the filter has taken
  int64_t slot;       // of the ring: the address of its first element
};

__device__ float value(double number, const float* at) { return at == nullptr ? static_cast<float>(number) : *at; }

__device__ int dtype_of(const DeviceRow& row, Array array) { return (row.dtypes >> (2 * array)) & 3; }

// Where the gradients of one step lie in the ring.
__device__ int64_t slot_of(const DeviceRow& row, uint32_t filtered) {
  const int64_t bytes = dtype_of(row, kGrokRing) == kFloat32 ? 4 : 2;
  return row.grok_ring + filtered % static_cast<uint32_t>(row.window) * row.size * bytes;
}

__device__ Plan make_plan(const DeviceRow& row, const DeviceSettings& s) {
  const float step = *reinterpret_cast<const float*>(row.step) + 1;
  const Rule rule = s.all.rule;
  const Filter filter = s.all.filter;
  const Numbers& number = s.all.number;
  const Addresses& at = s.all.at;
  const float lr = value(number.lr, at.lr), weight_decay = value(number.weight_decay, at.weight_decay);
  const bool coupled = rule == kAdam || rule == kSgd, known = filter != kNone && row.grok_step != 0;
  Plan plan{};
  plan.step = static_cast<uint32_t>(step);
  plan.filtered = known ? static_cast<uint32_t>(*reinterpret_cast<const float*>(row.grok_step)) : 0;
  // The ring is filled from the first step on.
  plan.filtering = known && (filter == kMa || plan.step > number.after_step);
  plan.seeding = plan.filtering && plan.filtered == 0;
  const float sign = number.maximize != 0 ? -1.0f : 1.0f;
  plan.factor = sign / value(1.0, at.grad_scale) * value(1.0, at.clip);
  plan.alpha = s.alpha;
  plan.fresh = s.fresh;
  plan.l2 = coupled ? weight_decay : 0.0f;
  plan.decay = coupled ? 1.0f : 1.0f - lr * weight_decay;
  plan.pace = s.adaptive ? lr / -expm1f(step * s.log_beta1) : lr;
  plan.debias = s.adaptive ? rsqrtf(-expm1f(step * s.log_beta2)) : 1.0f;
  if (plan.filtering) {
    const auto* sums = reinterpret_cast<const double*>(row.sums);
    const Seen seen{value(number.lamb, at.lamb), plan.factor, step, plan.filtered, row.window, sums};
    const Blend mix = blend(filter, number, seen);
    plan.gain = mix.gain;
    plan.pull = mix.pull;
    if (filter == kMa) plan.slot = slot_of(row, plan.filtered);
  }
  return plan;
}

__device__ uint16_t narrow_bfloat16(float x, uint32_t added) {
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (__float_as_uint(x) + added) >> 16);
}

__device__ uint16_t narrow(float x, int dtype) {
  const uint32_t half = 0x7fff + ((__float_as_uint(x) >> 16) & 1);
  return dtype == kBFloat16 ? narrow_bfloat16(x, half) : __half_as_ushort(__float2half_rn(x));
}

// kWidth consecutive values of one array, which is float32 if kPlain.
template <int kWidth, bool kPlain>
struct Values {
  float at[kWidth];

  __device__ void load(int64_t address, int64_t i, int dtype) { load_values<kWidth, kPlain>(at, address, i, dtype); }

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

// Returns the filtered gradient in place of the gradient, and moves the mean on.
template <int kWidth, bool kPlain>
__device__ void filter_by_mean(const DeviceRow& row, const Plan& plan, int64_t i, const uint32_t* words,
                               Values<kWidth, kPlain>& g) {
  Values<kWidth, kPlain> mu;
  mu.load(row.grok_exp_avg, i, dtype_of(row, kGrokExpAvg));
  for (int k = 0; k < kWidth; ++k) {
    mu.at[k] = plan.seeding ? g.at[k] : plan.alpha * mu.at[k] + plan.fresh * g.at[k];
    g.at[k] = plan.gain * g.at[k] + plan.pull * mu.at[k];
  }
  mu.store(row.grok_exp_avg, i, dtype_of(row, kGrokExpAvg), words, 16);
}

// Likewise, and moves the ring and its sum on.
template <int kWidth, bool kPlain>
__device__ void filter_by_ring(const DeviceRow& row, const Plan& plan, int64_t i, const uint32_t* words,
                               Values<kWidth, kPlain>& g) {
  const int dtype = dtype_of(row, kGrokRing);
  const uint32_t window = row.window, chunk = static_cast<uint32_t>(i / kRingChunk);
  const bool due = (plan.filtered + 1 + chunk) % (2 * window) == 0;
  Values<kWidth, kPlain> total{}, past{};
  if (due || plan.seeding) {
    for (uint32_t age = min(plan.filtered, window - 1); age > 0; --age) {
      past.load(slot_of(row, plan.filtered - age), i, dtype);
      for (int k = 0; k < kWidth; ++k) total.at[k] += past.at[k];
      past = {};
    }
  } else {
    total.load(row.grok_exp_avg, i, kFloat32);
    if (plan.filtered >= window) past.load(plan.slot, i, dtype);
  }
  g.store(plan.slot, i, dtype, words, 16);
  for (int k = 0; k < kWidth; ++k) {
    const bool narrow = !kPlain && dtype == kBFloat16;
    const float fresh = narrow ? widen(narrow_bfloat16(g.at[k], words[k] >> 16), kBFloat16) : g.at[k];
    total.at[k] += fresh - past.at[k];
    // A sum that is withheld may be infinite.
    if (plan.pull != 0) g.at[k] += plan.pull * total.at[k];
  }
  total.store(row.grok_exp_avg, i, kFloat32, nullptr, 0);
}

// The first moment after this step, and what a descent follows.
template <int kWidth, bool kPlain>
__device__ void move_moment(const Plan& plan, const DeviceSettings& s, const Values<kWidth, kPlain>& g,
                            Values<kWidth, kPlain>& m, Values<kWidth, kPlain>& along) {
  for (int k = 0; k < kWidth; ++k) {
    if (s.all.rule == kSgd) {
      m.at[k] = plan.step == 1 ? g.at[k] : s.beta1 * m.at[k] + s.take1 * g.at[k];
      along.at[k] = s.nesterov ? g.at[k] + s.beta1 * m.at[k] : m.at[k];
    } else {
      m.at[k] += s.take1 * (g.at[k] - m.at[k]);
      along.at[k] = s.nesterov ? g.at[k] + s.beta1 * (m.at[k] - g.at[k]) : m.at[k];
    }
  }
}

// kAdaptive: "adamw", "adam" or "atan2".
template <int kWidth, bool kPlain, bool kAdaptive>
__device__ void step_values(const DeviceRow& row, const Plan& plan, const DeviceSettings& s, int64_t i) {
  const bool moment = kAdaptive || row.exp_avg != 0, output = s.output;
  Values<kWidth, kPlain> p, g, m, v, e;
  if (kAdaptive || !output) p.load(row.param, i, dtype_of(row, kParam));
  g.load(row.grad, i, dtype_of(row, kGrad));
  if (moment) m.load(row.exp_avg, i, dtype_of(row, kExpAvg));
  if (kAdaptive) v.load(row.exp_avg_sq, i, dtype_of(row, kExpAvgSq));
  if (row.weight_ema != 0) e.load(row.weight_ema, i, dtype_of(row, kWeightEma));
  uint32_t first[kWidth], second[kWidth];
  if constexpr (!kPlain) {
    random_words(first, plan.step, i, 0);
    random_words(second, plan.step, i, 1);
  }

  // Rounded before it is used, so that the sum of a ring is that of its numbers.
  for (int k = 0; k < kWidth; ++k) g.at[k] = __fmul_rn(g.at[k], plan.factor);
  if (plan.filtering && s.all.filter == kMa) {
    filter_by_ring(row, plan, i, first, g);
  } else if (plan.filtering) {
    filter_by_mean(row, plan, i, first, g);
  }
  if (row.weight_ema != 0 && plan.step == 1) e = p;
  if constexpr (kAdaptive) {
    for (int k = 0; k < kWidth; ++k) {
      const float x = g.at[k] + plan.l2 * p.at[k];
      m.at[k] += s.take1 * (x - m.at[k]);
      v.at[k] = s.beta2 * v.at[k] + s.keep2 * x * x;
      const float vhat = sqrtf(v.at[k]) * plan.debias;
      const float update =
          s.all.rule == kATan2 ? plan.pace * atan2_right(m.at[k], vhat) : plan.pace * m.at[k] / (vhat + s.eps);
      p.at[k] = plan.decay * p.at[k] - update;
    }
  } else {
    if (!output) {
      for (int k = 0; k < kWidth; ++k) g.at[k] += plan.l2 * p.at[k];
    }
    Values<kWidth, kPlain> along = g;
    if (moment) move_moment(plan, s, g, m, along);
    for (int k = 0; k < kWidth; ++k) p.at[k] = output ? along.at[k] : p.at[k] - plan.pace * along.at[k];
  }

  p.store(row.param, i, dtype_of(row, kParam), nullptr, 0);
  if (moment) m.store(row.exp_avg, i, dtype_of(row, kExpAvg), first, 0);
  if (kAdaptive) v.store(row.exp_avg_sq, i, dtype_of(row, kExpAvgSq), second, 0);
  if (row.weight_ema == 0) return;
  for (int k = 0; k < kWidth; ++k) e.at[k] += s.ema_fresh * (p.at[k] - e.at[k]);
  e.store(row.weight_ema, i, dtype_of(row, kWeightEma), second, 16);
}

template <bool kPlain, bool kAdaptive>
__device__ void step_chunk(const DeviceRow& row, const Plan& plan, const DeviceSettings& s, int64_t begin,
                           int64_t end) {
  const int64_t wide_end = row.wide ? begin + (end - begin) / kVector * kVector : begin;
  for (int64_t i = begin + threadIdx.x * kVector; i < wide_end; i += kThreads * kVector) {
    step_values<kVector, kPlain, kAdaptive>(row, plan, s, i);
  }
  for (int64_t i = wide_end + threadIdx.x; i < end; i += kThreads) {
    step_values<1, kPlain, kAdaptive>(row, plan, s, i);
  }
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
    const Settings& all = launch.settings.all;
    const bool filtered = all.filter != kNone && row.grok_step != 0;
    const bool due = all.filter == kMa || *step > static_cast<float>(all.number.after_step);
    if (filtered && due) {
      *reinterpret_cast<float*>(row.grok_step) += 1;
    }
  }
  if (threadIdx.x == 0) *launch.ticket = 0;
}

template <int kRows, bool kPlain, bool kAdaptive>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Launch<kRows> launch) {
  const DeviceSettings& s = launch.settings;
  if (s.all.at.found_inf != nullptr && *s.all.at.found_inf != 0) return;
  __shared__ Plan plan;
  const int r = row_of_block(launch.first, launch.count);
  const DeviceRow& row = launch.rows[r];
  if (threadIdx.x == 0) plan = make_plan(row, s);
  __syncthreads();
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first[r]) * launch.chunk;
  step_chunk<kPlain, kAdaptive>(row, plan, s, begin, min(begin + launch.chunk, row.size));
  count_steps(launch);
}

DeviceRow device_row(const Row& row) {
  const int64_t dtypes[kArrays] = {row.param_dtype,      row.grad_dtype,         row.exp_avg_dtype,
                                   row.exp_avg_sq_dtype, row.grok_exp_avg_dtype, row.weight_ema_dtype,
                                   row.grok_ring_dtype};
  uint16_t packed = 0;
  for (int array = 0; array < kArrays; ++array) packed |= dtypes[array] << (2 * array);
  const int64_t addresses =
      row.param | row.grad | row.exp_avg | row.exp_avg_sq | row.grok_exp_avg | row.weight_ema | row.grok_ring;
  const bool wide = addresses % 16 == 0 && (row.window == 0 || row.size % kVector == 0);
  return {row.param,     row.grad, row.exp_avg, row.exp_avg_sq, row.grok_exp_avg, row.weight_ema,
          row.grok_ring, row.sums, row.step,    row.grok_step,  row.size,         static_cast<int32_t>(row.window),
          packed,        wide};
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
    launch.first[r + 1] = launch.first[r] + blocks_of(rows[r].size, chunk);  // an empty tensor takes steps too
  }
  const bool adaptive = settings.adaptive;
  const auto kernel = plain ? (adaptive ? step_kernel<kRows, true, true> : step_kernel<kRows, true, false>)
                            : (adaptive ? step_kernel<kRows, false, true> : step_kernel<kRows, false, false>);
  kernel<<<launch.first[count], kThreads, 0, stream>>>(launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

DeviceSettings device_settings(const Settings& all) {
  const Numbers& n = all.number;
  const Rest rest = rest_of(all.rule);
  DeviceSettings s;
  s.all = all;
  s.adaptive = rest == Rest::kDivide || rest == Rest::kAngle;
  s.output = rest == Rest::kWrite;
  s.nesterov = n.nesterov != 0;
  s.log_beta1 = static_cast<float>(std::log(n.beta1));
  s.beta1 = static_cast<float>(n.beta1);
  s.take1 = static_cast<float>(1.0 - (all.rule == kSgd ? n.dampening : n.beta1));
  s.beta2 = static_cast<float>(n.beta2);
  s.log_beta2 = static_cast<float>(std::log(n.beta2));
  s.keep2 = static_cast<float>(1.0 - n.beta2);
  s.eps = static_cast<float>(n.eps);
  s.alpha = static_cast<float>(n.alpha);
  s.fresh = static_cast<float>(1.0 - n.alpha);
  s.ema_fresh = static_cast<float>(1.0 - n.weight_ema);
  return s;
}

void adaptive_step_rows(Tensor table, std::optional<Tensor> ticket, int64_t rule, int64_t filter,
                        std::vector<double> numbers, std::optional<Tensor> lr_at, std::optional<Tensor> weight_decay_at,
                        std::optional<Tensor> lamb_at, std::optional<Tensor> grad_scale,
                        std::optional<Tensor> found_inf, std::optional<Tensor> clip) {
  const Addresses at{address(lr_at, true),      address(weight_decay_at, true), address(lamb_at, true),
                     address(grad_scale, true), address(found_inf, true),       address(clip, true)};
  const DeviceSettings s = device_settings(make_settings(rule, filter, numbers, at));
  const Row* rows = rows_of(table, s.all);
  const int64_t tensors = table.size(0);
  if (tensors == 0) return;
  STD_TORCH_CHECK(ticket && ticket->is_cuda() && trm_fast::is_flat(*ticket, torch::headeronly::ScalarType::Int, 1),
                  "adaptive_step: the ticket must be one int32 of a GPU");
  const int32_t device = ticket->get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  int64_t elements = 0;
  for (int64_t r = 0; r < tensors; ++r) elements += rows[r].size;
  const int64_t chunk = chunk_size(elements, device);
  int* counter = ticket->mutable_data_ptr<int>();
  for (int64_t r = 0; r < tensors; r += kManyRows) {
    const int64_t count = std::min<int64_t>(kManyRows, tensors - r);
    const auto launch = count <= kFewRows ? launch_rows<kFewRows> : launch_rows<kManyRows>;
    launch(rows + r, count, chunk, s, counter, current_stream(device));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CUDA, m) { m.impl("adaptive_step_rows_", TORCH_BOX(&adaptive_step_rows)); }
STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("_adaptive_step_cuda_knows", TORCH_BOX(&adaptive_step::known));
}
