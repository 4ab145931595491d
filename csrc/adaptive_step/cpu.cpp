// The meaning is in trm_fast/ops/adaptive_step.py.
//
// Every tensor is cut into blocks that stay in the first-level cache. A block is widened to float32 where it is
// stored in 16 bits, filtered, updated, averaged and narrowed again, so memory sees each byte once. The blocks of all
// tensors are shared out in one parallel_for.
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

// Small, so that a block of every array and its buffers leave half of a 32 KiB first-level cache to what is fetched
// next: with 1024 a step with 16-bit states took twice the time.
constexpr int64_t kBlock = 256;
constexpr int64_t kGrain = 32;  // blocks per thread; a fork costs about as much as their work
constexpr uint32_t kQuietNaN = 0x7fc0;

PER_CPU void widen_bfloat16(float* __restrict__ out, const uint16_t* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(&out[i], &bits, sizeof bits);
  }
}

PER_CPU void narrow_bfloat16(uint16_t* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &in[i], sizeof bits);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i] = static_cast<uint16_t>(in[i] != in[i] ? kQuietNaN : nearest);
  }
}

// Adds random bits below the kept ones, so that the expected value of the rounded number is the number.
PER_CPU void round_bfloat16(uint16_t* __restrict__ out, const float* __restrict__ in,
                            const uint32_t* __restrict__ words, int shift, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &in[i], sizeof bits);
    const uint32_t rounded = (bits + ((words[i] >> shift) & 0xffff)) >> 16;
    out[i] = static_cast<uint16_t>(in[i] != in[i] ? kQuietNaN : rounded);
  }
}

PER_CPU void random_words(uint32_t* __restrict__ words, uint32_t key, uint32_t first, int64_t size) {
  for (int64_t i = 0; i < size; ++i) words[i] = mix(key ^ (first + static_cast<uint32_t>(i)));
}

PER_CPU void widen_float16(float* __restrict__ out, const uint16_t* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(in[i]);
}

PER_CPU void narrow_float16(uint16_t* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(in[i]);
}

PER_CPU void scale(float* __restrict__ filtered, const float* __restrict__ grad, float factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) filtered[i] = grad[i] * factor;
}

PER_CPU void filter_ema(float* __restrict__ filtered, const float* __restrict__ grad, float* __restrict__ ema,
                        float factor, float alpha, float fresh, float lamb, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float g = grad[i] * factor;
    ema[i] = alpha * ema[i] + fresh * g;
    filtered[i] = g + lamb * ema[i];
  }
}

PER_CPU void filter_highpass(float* __restrict__ filtered, const float* __restrict__ grad, float* __restrict__ ema,
                             float factor, float alpha, float fresh, float lamb, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float g = grad[i] * factor;
    ema[i] = alpha * ema[i] + fresh * g;
    filtered[i] = g + lamb * (g - ema[i]);
  }
}

// What one tensor needs at one step, rounded once from double.
struct Plan {
  bool filtering, seeding;
  float factor;                    // gradient: sign * clip / grad_scale
  float alpha, fresh, lamb;        // filter; fresh = 1 - alpha, and (0, 1) seeds it with the gradient
  float keep1, beta2, keep2, eps;  // moments; keep = 1 - beta
  float l2, decay, pace, debias;   // wd of Adam; 1 - lr * wd of the others; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
  uint32_t step;
};

PER_CPU void update_adam(float* __restrict__ param, const float* __restrict__ filtered, float* __restrict__ exp_avg,
                         float* __restrict__ exp_avg_sq, const Plan& plan, int64_t size) {
  const float keep1 = plan.keep1, beta2 = plan.beta2, keep2 = plan.keep2, eps = plan.eps;
  const float l2 = plan.l2, decay = plan.decay, pace = plan.pace, debias = plan.debias;
  for (int64_t i = 0; i < size; ++i) {
    const float g = filtered[i] + l2 * param[i];
    exp_avg[i] += keep1 * (g - exp_avg[i]);
    exp_avg_sq[i] = beta2 * exp_avg_sq[i] + keep2 * g * g;
    param[i] = decay * param[i] - pace * exp_avg[i] / (std::sqrt(exp_avg_sq[i]) * debias + eps);
  }
}

PER_CPU void update_atan2(float* __restrict__ param, const float* __restrict__ filtered, float* __restrict__ exp_avg,
                          float* __restrict__ exp_avg_sq, const Plan& plan, int64_t size) {
  const float keep1 = plan.keep1, beta2 = plan.beta2, keep2 = plan.keep2;
  const float decay = plan.decay, pace = plan.pace, debias = plan.debias;
  for (int64_t i = 0; i < size; ++i) {
    const float g = filtered[i];
    exp_avg[i] += keep1 * (g - exp_avg[i]);
    exp_avg_sq[i] = beta2 * exp_avg_sq[i] + keep2 * g * g;
    param[i] = decay * param[i] - pace * atan2_right(exp_avg[i], std::sqrt(exp_avg_sq[i]) * debias);
  }
}

PER_CPU void average(float* __restrict__ ema, const float* __restrict__ param, float fresh, int64_t size) {
  for (int64_t i = 0; i < size; ++i) ema[i] += fresh * (param[i] - ema[i]);
}

// One array of one block: float32 is used where it lies, 16-bit data through a buffer.
class Block {
 public:
  Block(int64_t address, int64_t dtype, int64_t first, int64_t size, float* buffer)
      : data_(reinterpret_cast<char*>(address) + first * (dtype == kFloat32 ? 4 : 2)),
        values_(dtype == kFloat32 ? reinterpret_cast<float*>(data_) : buffer),
        dtype_(dtype),
        size_(size) {
    if (address == 0) values_ = nullptr;
    if (address != 0 && dtype == kBFloat16) widen_bfloat16(values_, halves(), size);
    if (address != 0 && dtype == kFloat16) widen_float16(values_, halves(), size);
  }

  float* values() const { return values_; }

  void store_nearest() const {
    if (dtype_ == kBFloat16) narrow_bfloat16(halves(), values_, size_);
    if (dtype_ == kFloat16) narrow_float16(halves(), values_, size_);
  }

  void store_state(const uint32_t* words, int shift) const {
    if (values_ != nullptr && dtype_ == kBFloat16) round_bfloat16(halves(), values_, words, shift, size_);
  }

 private:
  uint16_t* halves() const { return reinterpret_cast<uint16_t*>(data_); }

  char* data_;
  float* values_;
  int64_t dtype_, size_;
};

void step_block(const Row& row, const Plan& plan, const Settings& settings, int64_t first, int64_t size) {
  alignas(64) float buffers[7][kBlock];
  alignas(64) uint32_t words[kBlock];
  const Block param(row.param, row.param_dtype, first, size, buffers[0]);
  const Block grad(row.grad, row.grad_dtype, first, size, buffers[1]);
  const Block exp_avg(row.exp_avg, row.exp_avg_dtype, first, size, buffers[2]);
  const Block exp_avg_sq(row.exp_avg_sq, row.exp_avg_sq_dtype, first, size, buffers[3]);
  const Block grok(plan.filtering ? row.grok_exp_avg : 0, row.grok_exp_avg_dtype, first, size, buffers[4]);
  const Block ema(row.weight_ema, row.weight_ema_dtype, first, size, buffers[5]);
  float* filtered = buffers[6];

  if (plan.seeding) std::fill(grok.values(), grok.values() + size, 0.0f);
  if (!plan.filtering) {
    scale(filtered, grad.values(), plan.factor, size);
  } else {
    const auto filter = settings.filter == kEma ? filter_ema : filter_highpass;
    filter(filtered, grad.values(), grok.values(), plan.factor, plan.alpha, plan.fresh, plan.lamb, size);
  }
  const auto update = settings.rule == kATan2 ? update_atan2 : update_adam;
  update(param.values(), filtered, exp_avg.values(), exp_avg_sq.values(), plan, size);
  if (ema.values() != nullptr) {
    average(ema.values(), param.values(), static_cast<float>(1.0 - settings.weight_ema), size);
  }

  param.store_nearest();
  const auto high = static_cast<uint32_t>(first >> 32), low = static_cast<uint32_t>(first);
  if (row.exp_avg_dtype == kBFloat16 || row.grok_exp_avg_dtype == kBFloat16) {
    random_words(words, random_key(plan.step, high, 0), low, size);
    exp_avg.store_state(words, 0);
    grok.store_state(words, 16);
  }
  if (row.exp_avg_sq_dtype == kBFloat16 || row.weight_ema_dtype == kBFloat16) {
    random_words(words, random_key(plan.step, high, 1), low, size);
    exp_avg_sq.store_state(words, 0);
    ema.store_state(words, 16);
  }
}

Plan make_plan(const Row& row, const Settings& s, double factor) {
  const double step = *reinterpret_cast<const float*>(row.step) + 1.0;
  const bool filtering = s.filter != kNone && row.grok_step != 0 && step > s.after_step;
  const bool seeding = filtering && *reinterpret_cast<const float*>(row.grok_step) == 0;
  const double alpha = seeding ? 0.0 : s.alpha;
  const double l2 = s.rule == kAdam ? s.weight_decay : 0.0;
  const double decay = s.rule == kAdam ? 1.0 : 1.0 - s.lr * s.weight_decay;
  Plan plan{};
  plan.filtering = filtering;
  plan.seeding = seeding;
  plan.factor = static_cast<float>(factor);
  plan.alpha = static_cast<float>(alpha);
  plan.fresh = static_cast<float>(1.0 - alpha);
  plan.lamb = static_cast<float>(s.lamb);
  plan.keep1 = static_cast<float>(1.0 - s.beta1);
  plan.beta2 = static_cast<float>(s.beta2);
  plan.keep2 = static_cast<float>(1.0 - s.beta2);
  plan.eps = static_cast<float>(s.eps);
  plan.l2 = static_cast<float>(l2);
  plan.decay = static_cast<float>(decay);
  plan.pace = static_cast<float>(s.lr / (1.0 - std::pow(s.beta1, step)));
  plan.debias = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(s.beta2, step)));
  plan.step = static_cast<uint32_t>(step);
  return plan;
}

float count_at(int64_t address) { return address == 0 ? 0.0f : *reinterpret_cast<const float*>(address); }

// Neighbours have mostly taken the same steps, which saves the powers of a plan.
bool same_history(const Row& a, const Row& b) {
  return count_at(a.step) == count_at(b.step) && count_at(a.grok_step) == count_at(b.grok_step) &&
         (a.grok_step == 0) == (b.grok_step == 0);
}

void count(const Row& row, const Plan& plan) {
  *reinterpret_cast<float*>(row.step) += 1;
  if (plan.filtering) *reinterpret_cast<float*>(row.grok_step) += 1;
}

void step_rows(const Row* rows, int64_t tensors, const Settings& settings, double factor) {
  std::vector<Plan> plans(tensors);
  std::vector<int64_t> first(tensors + 1, 0);  // number of blocks before each tensor
  for (int64_t t = 0; t < tensors; ++t) {
    plans[t] = t > 0 && same_history(rows[t], rows[t - 1]) ? plans[t - 1] : make_plan(rows[t], settings, factor);
    first[t + 1] = first[t] + (rows[t].size + kBlock - 1) / kBlock;
  }
  torch::stable::parallel_for(0, first[tensors], kGrain, [&](int64_t begin, int64_t end) {
    int64_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (block >= first[t + 1]) ++t;
      const int64_t offset = (block - first[t]) * kBlock;
      step_block(rows[t], plans[t], settings, offset, std::min(kBlock, rows[t].size - offset));
    }
  });
  for (int64_t t = 0; t < tensors; ++t) count(rows[t], plans[t]);
}

void adaptive_step_rows(Tensor table, std::optional<Tensor> ticket, int64_t rule, int64_t filter, double lr,
                        double beta1, double beta2, double eps, double weight_decay, double alpha, double lamb,
                        int64_t after_step, bool maximize, double weight_ema, std::optional<Tensor> lr_at,
                        std::optional<Tensor> weight_decay_at, std::optional<Tensor> lamb_at,
                        std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, std::optional<Tensor> clip) {
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
                    maximize,
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
