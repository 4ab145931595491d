// The meaning is in trm_fast/ops/adaptive_step.py.
//
// All tensors are cut into blocks, which are shared out in one parallel_for. One loop reads every array of a block,
// filters, updates and writes back, so memory sees each byte once. Parameters and gradients in 16 bits, and second
// moments and weight averages in bfloat16, pass through buffers that stay in the first-level cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "adaptive_step/math.h"
#include "adaptive_step/table.h"
#include "common/per_cpu.h"

using torch::stable::Tensor;

namespace {
using namespace adaptive_step;

constexpr int64_t kBlock = 1024;  // none from 256 to 8192 was faster
// Passes over buffers want room in the first-level cache for what is fetched next: with blocks of 1024, a step of a
// bfloat16 model of 7 M parameters took 1.3 times as long.
constexpr int64_t kBufferedBlock = 256;
constexpr int64_t kGrain = 8;  // blocks per thread; a fork costs about as much as their work
constexpr uint32_t kQuietNaN = 0x7fc0;

struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Adding random bits below the kept ones makes the expected value of the rounded number the number.
inline BFloat16 round_up_by(float x, uint32_t added) {
  return {static_cast<uint16_t>(x != x ? kQuietNaN : (bits_of(x) + added) >> 16)};
}
inline void store(float& out, float x, uint32_t) { out = x; }
inline void store(BFloat16& out, float x, uint32_t random) { out = round_up_by(x, random & 0xffff); }

PER_CPU void widen_bfloat16(float* __restrict__ out, const BFloat16* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = widen(in[i]);
}

PER_CPU void narrow_bfloat16(BFloat16* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = round_up_by(in[i], 0x7fff + ((bits_of(in[i]) >> 16) & 1));
}

PER_CPU void round_bfloat16(BFloat16* __restrict__ out, const float* __restrict__ in, uint32_t key, uint32_t first,
                            int shift, int64_t size) {
  for (int64_t i = 0; i < size; ++i) store(out[i], in[i], mix(key ^ (first + static_cast<uint32_t>(i))) >> shift);
}

PER_CPU void widen_float16(float* __restrict__ out, const uint16_t* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(in[i]);
}

PER_CPU void narrow_float16(uint16_t* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(in[i]);
}

PER_CPU void average(float* __restrict__ ema, const float* __restrict__ param, float fresh, int64_t size) {
  for (int64_t i = 0; i < size; ++i) ema[i] += fresh * (param[i] - ema[i]);
}

struct Settings {
  Rule rule;
  Filter filter;
  double lr, beta1, beta2, eps, weight_decay, alpha, lamb;
  int64_t after_step;
  double weight_ema;
};

// What one tensor needs at one step, rounded once from double.
struct Plan {
  bool filtering, seeding;
  float factor;                    // of the gradient: sign * clip / grad_scale
  float alpha, fresh, lamb;        // filter; fresh = 1 - alpha
  float keep1, beta2, keep2, eps;  // moments; keep = 1 - beta
  float l2, decay;                 // weight decay of Adam; 1 - lr * weight decay of the other rules
  float pace, debias;              // lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
  uint32_t step;
};

// One block of a tensor, as far as the main loop sees it. Mean and moment are float or BFloat16.
struct Span {
  float* param;
  const float* grad;
  void* exp_avg;
  float* exp_avg_sq;
  void* grok_exp_avg;
  uint32_t key, first;  // of the random bits
  int64_t size;
};

template <Filter kFilter, bool kATan, class Moment, class Mean>
PER_CPU void update(const Span& span, const Plan& plan) {
  float* __restrict__ param = span.param;
  const float* __restrict__ grad = span.grad;
  Moment* __restrict__ exp_avg = static_cast<Moment*>(span.exp_avg);
  float* __restrict__ exp_avg_sq = span.exp_avg_sq;
  Mean* __restrict__ grok_exp_avg = static_cast<Mean*>(span.grok_exp_avg);
  const Plan p = plan;
  const uint32_t key = span.key, first = span.first;
  const int64_t size = span.size;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t random = mix(key ^ (first + static_cast<uint32_t>(i)));  // dropped where nothing is rounded
    float g = grad[i] * p.factor;
    if constexpr (kFilter != kNone) {
      const float mean = p.alpha * widen(grok_exp_avg[i]) + p.fresh * g;
      store(grok_exp_avg[i], mean, random >> 16);
      g += p.lamb * (kFilter == kEma ? mean : g - mean);
    }
    g += p.l2 * param[i];
    const float old = widen(exp_avg[i]);
    const float m = old + p.keep1 * (g - old);
    store(exp_avg[i], m, random);
    const float v = p.beta2 * exp_avg_sq[i] + p.keep2 * g * g;
    exp_avg_sq[i] = v;
    const float vhat = std::sqrt(v) * p.debias;
    param[i] = p.decay * param[i] - (kATan ? p.pace * atan2_right(m, vhat) : p.pace * m / (vhat + p.eps));
  }
}

using Update = void (*)(const Span&, const Plan&);

template <Filter kFilter, bool kATan, class Moment>
Update choose_mean(int64_t mean) {
  return mean == kBFloat16 ? update<kFilter, kATan, Moment, BFloat16> : update<kFilter, kATan, Moment, float>;
}

template <Filter kFilter, bool kATan>
Update choose_dtypes(int64_t moment, int64_t mean) {
  return moment == kBFloat16 ? choose_mean<kFilter, kATan, BFloat16>(mean) : choose_mean<kFilter, kATan, float>(mean);
}

template <Filter kFilter>
Update choose_rule(const Row& row, Rule rule) {
  const int64_t mean = kFilter == kNone ? kFloat32 : row.grok_exp_avg_dtype;
  return rule == kATan2 ? choose_dtypes<kFilter, true>(row.exp_avg_dtype, mean)
                        : choose_dtypes<kFilter, false>(row.exp_avg_dtype, mean);
}

Update choose_update(const Row& row, const Plan& plan, const Settings& settings) {
  if (!plan.filtering) return choose_rule<kNone>(row, settings.rule);
  return settings.filter == kEma ? choose_rule<kEma>(row, settings.rule) : choose_rule<kHighpass>(row, settings.rule);
}

char* place(int64_t address, int64_t dtype, int64_t first) {
  return reinterpret_cast<char*>(address) + first * (dtype == kFloat32 ? 4 : 2);
}

// An array of a block as float32: where it lies, or widened into a buffer.
float* load(int64_t address, int64_t dtype, int64_t first, int64_t size, float* buffer) {
  char* data = place(address, dtype, first);
  if (dtype == kFloat32) return reinterpret_cast<float*>(data);
  if (dtype == kBFloat16) widen_bfloat16(buffer, reinterpret_cast<BFloat16*>(data), size);
  if (dtype == kFloat16) widen_float16(buffer, reinterpret_cast<uint16_t*>(data), size);
  return buffer;
}

void step_block(const Row& row, const Plan& plan, const Settings& settings, Update update, int64_t first,
                int64_t size) {
  alignas(64) float buffers[4][kBufferedBlock];
  const auto low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  float* param = load(row.param, row.param_dtype, first, size, buffers[0]);
  float* exp_avg_sq = load(row.exp_avg_sq, row.exp_avg_sq_dtype, first, size, buffers[2]);
  Span span{param,
            load(row.grad, row.grad_dtype, first, size, buffers[1]),
            place(row.exp_avg, row.exp_avg_dtype, first),
            exp_avg_sq,
            place(row.grok_exp_avg, row.grok_exp_avg_dtype, first),
            random_key(plan.step, high, 0),
            low,
            size};
  if (plan.seeding) std::memset(span.grok_exp_avg, 0, size * (row.grok_exp_avg_dtype == kFloat32 ? 4 : 2));
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
  average(ema, param, static_cast<float>(1.0 - settings.weight_ema), size);
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
  const double step = count_at(row.step) + 1.0;
  const bool filtering = s.filter != kNone && row.grok_step != 0 && step > s.after_step;
  Plan plan{};
  plan.filtering = filtering;
  plan.seeding = filtering && count_at(row.grok_step) == 0;
  plan.factor = static_cast<float>(factor);
  // The mean is cleared before it is seeded, whatever it held.
  plan.alpha = static_cast<float>(s.alpha);
  plan.fresh = plan.seeding ? 1.0f : static_cast<float>(1.0 - s.alpha);
  plan.lamb = static_cast<float>(s.lamb);
  plan.keep1 = static_cast<float>(1.0 - s.beta1);
  plan.beta2 = static_cast<float>(s.beta2);
  plan.keep2 = static_cast<float>(1.0 - s.beta2);
  plan.eps = static_cast<float>(s.eps);
  plan.l2 = static_cast<float>(s.rule == kAdam ? s.weight_decay : 0.0);
  plan.decay = static_cast<float>(s.rule == kAdam ? 1.0 : 1.0 - s.lr * s.weight_decay);
  plan.pace = static_cast<float>(s.lr / (1.0 - std::pow(s.beta1, step)));
  plan.debias = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(s.beta2, step)));
  plan.step = static_cast<uint32_t>(step);
  return plan;
}

// Neighbours have mostly taken the same steps, which saves the powers of a plan.
bool same_history(const Row& a, const Row& b) {
  return count_at(a.step) == count_at(b.step) && count_at(a.grok_step) == count_at(b.grok_step) &&
         (a.grok_step == 0) == (b.grok_step == 0);
}

void step_rows(const Row* rows, int64_t tensors, const Settings& settings, double factor) {
  std::vector<Plan> plans(tensors);
  std::vector<Update> updates(tensors);
  std::vector<int64_t> first(tensors + 1, 0);  // number of blocks before each tensor
  for (int64_t t = 0; t < tensors; ++t) {
    plans[t] = t > 0 && same_history(rows[t], rows[t - 1]) ? plans[t - 1] : make_plan(rows[t], settings, factor);
    updates[t] = choose_update(rows[t], plans[t], settings);
    first[t + 1] = first[t] + (rows[t].size + block_size(rows[t]) - 1) / block_size(rows[t]);
  }
  torch::stable::parallel_for(0, first[tensors], kGrain, [&](int64_t begin, int64_t end) {
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

void adaptive_step_rows(Tensor table, std::optional<Tensor> ticket, int64_t rule, int64_t filter, double lr,
                        double beta1, double beta2, double eps, double weight_decay, double alpha, double lamb,
                        int64_t after_step, bool maximize, double weight_ema, std::optional<Tensor> lr_at,
                        std::optional<Tensor> weight_decay_at, std::optional<Tensor> lamb_at,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip) {
  STD_TORCH_CHECK(table.size(1) == kColumns, "adaptive_step: the table must have ", kColumns, " columns");
  if (found_inf && *address(found_inf) != 0) return;
  Settings settings{static_cast<Rule>(rule),
                    static_cast<Filter>(filter),
                    lr,
                    beta1,
                    beta2,
                    eps,
                    weight_decay,
                    alpha,
                    lamb,
                    after_step,
                    weight_ema};
  if (lr_at) settings.lr = *address(lr_at);
  if (weight_decay_at) settings.weight_decay = *address(weight_decay_at);
  if (lamb_at) settings.lamb = *address(lamb_at);
  double factor = maximize ? -1.0 : 1.0;
  if (grad_scale) factor /= *address(grad_scale);
  if (clip) factor *= *address(clip);
  step_rows(static_cast<const Row*>(table.data_ptr()), table.size(0), settings, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) { m.impl("adaptive_step_rows_", TORCH_BOX(&adaptive_step_rows)); }
