// The meaning is in trm_fast/ops/adaptive_step.py.
//
// All tensors are cut into blocks, which are shared out in one parallel_for. One loop reads every array of a block,
// filters, updates and writes back, so memory sees each byte once. Parameters and gradients in 16 bits, and second
// moments and weight averages in bfloat16, pass through buffers that stay in the first-level cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "adaptive_step/math.h"
#include "adaptive_step/settings.h"
#include "adaptive_step/table.h"
#include "common/checks.h"
#include "common/cpu_floats.h"
#include "common/parallel.h"
#include "common/per_cpu.h"

using torch::stable::Tensor;

namespace {
using namespace adaptive_step;
using namespace trm_fast;

constexpr int64_t kBlock = 1024;  // none from 256 to 8192 was faster
// Passes over buffers want room in the first-level cache for what is fetched next: with blocks of 1024, a step of a
// bfloat16 model of 7 M parameters took 1.3 times as long.
constexpr int64_t kBufferedBlock = 256;
constexpr int64_t kChunk = 1024;  // whose ring is summed anew together; a multiple of both
constexpr int64_t kAhead = 4;     // slots of a ring that are fetched ahead: 16 KB of the first-level cache
constexpr int64_t kGrain = 8;     // blocks per thread; a fork costs about as much as their work
constexpr uint32_t kQuietNaN = 0x7fc0;

// Adding random bits below the kept ones makes the expected value of the rounded number the number.
inline BFloat16 round_up_by(float x, uint32_t added) {
  return {static_cast<uint16_t>(x != x ? kQuietNaN : (bits_of(x) + added) >> 16)};
}
inline void store(float& out, float x, uint32_t) { out = x; }
inline void store(BFloat16& out, float x, uint32_t random) { out = round_up_by(x, random & 0xffff); }

PER_CPU void narrow_bfloat16(BFloat16* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = round_up_by(in[i], 0x7fff + ((bits_of(in[i]) >> 16) & 1));
}

PER_CPU void round_bfloat16(BFloat16* __restrict__ out, const float* __restrict__ in, uint32_t key, uint32_t first,
                            int shift, int64_t size) {
  for (int64_t i = 0; i < size; ++i) store(out[i], in[i], mix(key ^ (first + static_cast<uint32_t>(i))) >> shift);
}

PER_CPU void narrow_float16(uint16_t* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(in[i]);
}

PER_CPU void average(float* __restrict__ ema, const float* __restrict__ param, float fresh, int64_t size) {
  for (int64_t i = 0; i < size; ++i) ema[i] += fresh * (param[i] - ema[i]);
}

PER_CPU void add(float* __restrict__ sum, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += in[i];
}

// What one tensor needs at one step, rounded once from double.
struct Plan {
  bool filtering, seeding;
  bool output;              // the parameter is only written, and need not be read
  float factor;             // of the gradient: sign * clip / grad_scale
  float alpha, fresh;       // mean; fresh = 1 - alpha
  float gain, pull;         // of gradient and mean in what the filter gives
  float keep1, take1;       // first moment: keep1 * old + take1 * gradient
  float direct, through;    // of gradient and first moment in a descent
  float beta2, keep2, eps;  // keep2 = 1 - beta2
  float l2, decay;          // weight decay of Adam and SGD; 1 - lr * weight decay of the other rules
  float pace, debias;       // lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
  int64_t filtered;         // steps that the filter has taken
  uint32_t step;
};

// One block of a tensor, as far as the main loop sees it.
struct Span {
  float* param;
  const float* grad;
  void* exp_avg;
  float* exp_avg_sq;
  void* grok_exp_avg;
  void* ring;           // the slot of this step
  uint32_t key, first;  // of the random bits
  int64_t size;
};

enum class Slow { kNone, kMean, kRing };  // what the filter keeps
struct None {};

// Moment is None, float or BFloat16; Mean, the type of the mean or of the ring, is float or BFloat16.
template <Slow kSlow, class Mean, Rest kRest, class Moment>
PER_CPU void update(const Span& span, const Plan& plan) {
  constexpr bool kMoment = !std::is_same_v<Moment, None>;
  float* __restrict__ param = span.param;
  const float* __restrict__ grad = span.grad;
  Moment* __restrict__ exp_avg = static_cast<Moment*>(span.exp_avg);
  float* __restrict__ exp_avg_sq = span.exp_avg_sq;
  Mean* __restrict__ mean = static_cast<Mean*>(span.grok_exp_avg);
  float* __restrict__ total = static_cast<float*>(span.grok_exp_avg);
  Mean* __restrict__ ring = static_cast<Mean*>(span.ring);
  const Plan p = plan;
  const uint32_t key = span.key, first = span.first;
  const int64_t size = span.size;
#pragma GCC ivdep  // with a ring there are more pairs of arrays than it checks for overlap
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t random = mix(key ^ (first + static_cast<uint32_t>(i)));  // dropped where nothing is rounded
    float g = grad[i] * p.factor;
    if constexpr (kSlow == Slow::kMean) {
      const float mu = p.alpha * widen(mean[i]) + p.fresh * g;
      store(mean[i], mu, random >> 16);
      g = p.gain * g + p.pull * mu;
    }
    if constexpr (kSlow == Slow::kRing) {
      const float oldest = widen(ring[i]);
      store(ring[i], g, random >> 16);
      const float sum = total[i] + (widen(ring[i]) - oldest);
      total[i] = sum;
      g = p.pull != 0 ? g + p.pull * sum : g;  // a sum that is withheld may be infinite
    }
    if constexpr (kRest != Rest::kWrite) g += p.l2 * param[i];
    float m = 0;
    if constexpr (kMoment) {
      const float old = widen(exp_avg[i]);
      m = kRest == Rest::kDescend ? p.take1 * g + (p.keep1 != 0 ? p.keep1 * old : 0) : old + p.take1 * (g - old);
      store(exp_avg[i], m, random);
    }
    if constexpr (kRest == Rest::kDivide || kRest == Rest::kAngle) {
      const float v = p.beta2 * exp_avg_sq[i] + p.keep2 * g * g;
      exp_avg_sq[i] = v;
      const float vhat = std::sqrt(v) * p.debias;
      const float change = kRest == Rest::kAngle ? p.pace * atan2_right(m, vhat) : p.pace * m / (vhat + p.eps);
      param[i] = p.decay * param[i] - change;
    } else {
      const float along = !kMoment ? g : p.direct != 0 ? p.direct * g + p.through * m : m;
      param[i] = kRest == Rest::kWrite ? along : param[i] - p.pace * along;
    }
  }
}

using Update = void (*)(const Span&, const Plan&);

template <Slow kSlow, class Mean, Rest kRest>
Update choose_moment(const Row& row) {
  if (row.exp_avg == 0) return update<kSlow, Mean, kRest, None>;
  return row.exp_avg_dtype == kBFloat16 ? update<kSlow, Mean, kRest, BFloat16> : update<kSlow, Mean, kRest, float>;
}

template <Slow kSlow, class Mean>
Update choose_rest(const Row& row, Rule rule) {
  const bool narrow = row.exp_avg_dtype == kBFloat16;
  switch (rest_of(rule)) {
    case Rest::kDivide:
      return narrow ? update<kSlow, Mean, Rest::kDivide, BFloat16> : update<kSlow, Mean, Rest::kDivide, float>;
    case Rest::kAngle:
      return narrow ? update<kSlow, Mean, Rest::kAngle, BFloat16> : update<kSlow, Mean, Rest::kAngle, float>;
    case Rest::kDescend:
      return choose_moment<kSlow, Mean, Rest::kDescend>(row);
    case Rest::kWrite:
      return choose_moment<kSlow, Mean, Rest::kWrite>(row);
  }
  return nullptr;
}

Update choose_update(const Row& row, const Plan& plan, const Settings& settings) {
  const Rule rule = settings.rule;
  if (!plan.filtering) return choose_rest<Slow::kNone, float>(row, rule);
  if (settings.filter == kMa) {
    return row.grok_ring_dtype == kBFloat16 ? choose_rest<Slow::kRing, BFloat16>(row, rule)
                                            : choose_rest<Slow::kRing, float>(row, rule);
  }
  return row.grok_exp_avg_dtype == kBFloat16 ? choose_rest<Slow::kMean, BFloat16>(row, rule)
                                             : choose_rest<Slow::kMean, float>(row, rule);
}

// Asks for memory that is about to be read; the slots of a ring lie too far apart for the CPU to guess.
void prefetch(const char* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i);
}

// Adds up the gradients of a chunk in the ring, oldest first, but for the slot of this step.
void sum_ring(const Row& row, const Plan& plan, int64_t first, int64_t size, float* total) {
  alignas(64) float buffer[kBlock];
  const auto at = [&](int64_t age) { return (plan.filtered - age) % row.window * row.size + first; };
  const int64_t bytes = size * (row.grok_ring_dtype == kFloat32 ? 4 : 2);
  std::memset(total, 0, size * sizeof(float));
  for (int64_t age = std::min(plan.filtered, row.window - 1); age > 0; --age) {
    if (age > kAhead) prefetch(place(row.grok_ring, row.grok_ring_dtype, at(age - kAhead)), bytes);
    add(total, load(row.grok_ring, row.grok_ring_dtype, at(age), size, buffer), size);
  }
}

// Returns the slot of this step; what it adds to, and what it replaces, is then in place.
void* ready_ring(const Row& row, const Plan& plan, int64_t first, int64_t size, float* total) {
  const int64_t slot = plan.filtered % row.window;
  char* ring = place(row.grok_ring, row.grok_ring_dtype, slot * row.size + first);
  const bool due = (plan.filtered + 1 + first / kChunk) % (2 * row.window) == 0;
  if (due || plan.seeding) sum_ring(row, plan, first, size, total);
  // A sum taken anew does not hold the oldest gradient any more, and an empty slot holds none.
  if (due || plan.filtered < row.window) std::memset(ring, 0, size * (row.grok_ring_dtype == kFloat32 ? 4 : 2));
  return ring;
}

void step_block(const Row& row, const Plan& plan, const Settings& settings, Update update, int64_t first,
                int64_t size) {
  alignas(64) float buffers[4][kBufferedBlock];
  const auto low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  float* param = plan.output && row.param_dtype != kFloat32 ? buffers[0]
                                                            : load(row.param, row.param_dtype, first, size, buffers[0]);
  float* exp_avg_sq = load(row.exp_avg_sq, row.exp_avg_sq_dtype, first, size, buffers[2]);
  Span span{param,
            load(row.grad, row.grad_dtype, first, size, buffers[1]),
            place(row.exp_avg, row.exp_avg_dtype, first),
            exp_avg_sq,
            place(row.grok_exp_avg, row.grok_exp_avg_dtype, first),
            nullptr,
            random_key(plan.step, high, 0),
            low,
            size};
  if (plan.filtering && settings.filter == kMa) {
    span.ring = ready_ring(row, plan, first, size, static_cast<float*>(span.grok_exp_avg));
  } else if (plan.seeding) {
    std::memset(span.grok_exp_avg, 0, size * (row.grok_exp_avg_dtype == kFloat32 ? 4 : 2));
  }
  float* ema = row.weight_ema == 0 ? nullptr : load(row.weight_ema, row.weight_ema_dtype, first, size, buffers[3]);
  if (ema != nullptr && plan.step == 1) std::copy(param, param + size, ema);
  update(span, plan);

  char* data = place(row.param, row.param_dtype, first);
  if (row.param_dtype == kBFloat16) narrow_bfloat16(reinterpret_cast<BFloat16*>(data), param, size);
  if (row.param_dtype == kFloat16) narrow_float16(reinterpret_cast<uint16_t*>(data), param, size);
  const uint32_t key = random_key(plan.step, high, 1);
  if (row.exp_avg_sq_dtype == kBFloat16) {
    data = place(row.exp_avg_sq, kBFloat16, first);
    round_bfloat16(reinterpret_cast<BFloat16*>(data), exp_avg_sq, key, low, 0, size);
  }
  if (ema == nullptr) return;
  average(ema, param, static_cast<float>(1.0 - settings.number.weight_ema), size);
  if (row.weight_ema_dtype == kBFloat16) {
    data = place(row.weight_ema, kBFloat16, first);
    round_bfloat16(reinterpret_cast<BFloat16*>(data), ema, key, low, 16, size);
  }
}

int64_t block_size(const Row& row) {
  const bool direct = row.param_dtype == kFloat32 && row.grad_dtype == kFloat32 && row.exp_avg_sq_dtype == kFloat32 &&
                      row.weight_ema_dtype == kFloat32;
  return direct ? kBlock : kBufferedBlock;
}

float count_at(int64_t address) { return address == 0 ? 0.0f : *reinterpret_cast<const float*>(address); }

Plan make_plan(const Row& row, const Settings& s, double factor) {
  const Numbers& n = s.number;
  const double step = count_at(row.step) + 1.0;
  const Rest rest = rest_of(s.rule);
  const bool adaptive = rest == Rest::kDivide || rest == Rest::kAngle;
  Plan plan{};
  plan.filtered = static_cast<int64_t>(count_at(row.grok_step));
  // The ring is filled from the first step on.
  plan.filtering = s.filter != kNone && row.grok_step != 0 && (s.filter == kMa || step > n.after_step);
  plan.seeding = plan.filtering && plan.filtered == 0;
  plan.factor = static_cast<float>(factor);
  plan.output = rest == Rest::kWrite;
  // The mean is cleared before it is seeded, whatever it held.
  plan.alpha = static_cast<float>(n.alpha);
  plan.fresh = plan.seeding ? 1.0f : static_cast<float>(1.0 - n.alpha);
  const bool starts = s.rule == kSgd && step == 1.0;  // with the gradient, undampened
  plan.keep1 = static_cast<float>(starts ? 0.0 : n.beta1);
  plan.take1 = static_cast<float>(s.rule != kSgd ? 1.0 - n.beta1 : starts ? 1.0 : 1.0 - n.dampening);
  plan.direct = static_cast<float>(n.nesterov == 0 ? 0.0 : s.rule == kMomentum ? 1.0 - n.beta1 : 1.0);
  plan.through = static_cast<float>(n.nesterov != 0 ? n.beta1 : 1.0);
  plan.beta2 = static_cast<float>(n.beta2);
  plan.keep2 = static_cast<float>(1.0 - n.beta2);
  plan.eps = static_cast<float>(n.eps);
  const bool coupled = s.rule == kAdam || s.rule == kSgd;
  plan.l2 = static_cast<float>(coupled ? n.weight_decay : 0.0);
  plan.decay = static_cast<float>(coupled ? 1.0 : 1.0 - n.lr * n.weight_decay);
  plan.pace = static_cast<float>(adaptive ? n.lr / (1.0 - std::pow(n.beta1, step)) : n.lr);
  plan.debias = static_cast<float>(adaptive ? 1.0 / std::sqrt(1.0 - std::pow(n.beta2, step)) : 1.0);
  plan.step = static_cast<uint32_t>(step);
  return plan;
}

// Neighbours have mostly taken the same steps, which saves the powers of a plan.
bool same_history(const Row& a, const Row& b) {
  return count_at(a.step) == count_at(b.step) && count_at(a.grok_step) == count_at(b.grok_step) &&
         (a.grok_step == 0) == (b.grok_step == 0) && a.window == b.window;
}

void step_rows(const Row* rows, int64_t tensors, const Settings& settings, double factor) {
  std::vector<Plan> plans(tensors);
  std::vector<Update> updates(tensors);
  std::vector<int64_t> first(tensors + 1, 0);  // number of blocks before each tensor
  for (int64_t t = 0; t < tensors; ++t) {
    plans[t] = t > 0 && same_history(rows[t], rows[t - 1]) ? plans[t - 1] : make_plan(rows[t], settings, factor);
    if (plans[t].filtering) {
      const auto* sums = reinterpret_cast<const double*>(rows[t].sums);
      const Seen seen{settings.number.lamb, factor,         static_cast<double>(plans[t].step),
                      plans[t].filtered,    rows[t].window, sums};
      const Blend mix = blend(settings.filter, settings.number, seen);
      plans[t].gain = mix.gain;
      plans[t].pull = mix.pull;
    }
    updates[t] = choose_update(rows[t], plans[t], settings);
    first[t + 1] = first[t] + (rows[t].size + block_size(rows[t]) - 1) / block_size(rows[t]);
  }
  trm_fast::parallel_for(0, first[tensors], kGrain, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (block >= first[t + 1]) ++t;
      const int64_t size = block_size(rows[t]), offset = (block - first[t]) * size;
      step_block(rows[t], plans[t], settings, updates[t], offset, std::min(size, rows[t].size - offset));
    }
  });
  for (int64_t t = 0; t < tensors; ++t) {
    *reinterpret_cast<float*>(rows[t].step) += 1;
    if (plans[t].filtering) *reinterpret_cast<float*>(rows[t].grok_step) += 1;
  }
}

// A place in the ring follows from these numbers, which anyone may have written.
void check_counters(const Row* rows, int64_t tensors) {
  const auto is_count = [](float count) { return 0.0f <= count && count < 0x1p32f; };
  for (int64_t t = 0; t < tensors; ++t) {
    const float step = count_at(rows[t].step), grok_step = count_at(rows[t].grok_step);
    STD_TORCH_CHECK(is_count(step) && is_count(grok_step), "adaptive_step: finished steps must be from 0 to 2^32; got ",
                    step, " and ", grok_step);
  }
}

void adaptive_step_rows(Tensor table, std::optional<Tensor> ticket, int64_t rule, int64_t filter,
                        std::vector<double> numbers, std::optional<Tensor> lr_at, std::optional<Tensor> weight_decay_at,
                        std::optional<Tensor> lamb_at, std::optional<Tensor> grad_scale,
                        std::optional<Tensor> found_inf, std::optional<Tensor> clip) {
  const Addresses at{address(lr_at, false),      address(weight_decay_at, false), address(lamb_at, false),
                     address(grad_scale, false), address(found_inf, false),       address(clip, false)};
  Settings settings = make_settings(rule, filter, numbers, at);
  const Row* rows = rows_of(table, settings);
  if (at.found_inf != nullptr && *at.found_inf != 0) return;
  if (at.lr != nullptr) settings.number.lr = *at.lr;
  if (at.weight_decay != nullptr) settings.number.weight_decay = *at.weight_decay;
  if (at.lamb != nullptr) settings.number.lamb = *at.lamb;
  double factor = settings.number.maximize != 0 ? -1.0 : 1.0;
  if (at.grad_scale != nullptr) factor /= *at.grad_scale;
  if (at.clip != nullptr) factor *= *at.clip;
  check_counters(rows, table.size(0));
  step_rows(rows, table.size(0), settings, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) { m.impl("adaptive_step_rows_", TORCH_BOX(&adaptive_step_rows)); }
STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("_adaptive_step_cpp_knows", TORCH_BOX(&adaptive_step::known));
}
