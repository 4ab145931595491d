// What a native step knows: rules, filters and numbers by the names of trm_fast/ops/adaptive_step.py. Python asks for
// this list, hands over what stands in it, and runs anything else on the reference.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/checks.h"

namespace adaptive_step {

enum Rule : int64_t { kAdamW, kAdam, kATan2, kSgd, kMomentum, kFilter };
enum Filter : int64_t { kNone, kEma, kHighpass, kProjection, kCosineGate, kMa };

// The compiler refuses a switch over modes that lacks a case.
struct Mode {
  const char* name;
  int64_t number;
};
constexpr Mode kRules[] = {{"adamw", kAdamW}, {"adam", kAdam},         {"atan2", kATan2},
                           {"sgd", kSgd},     {"momentum", kMomentum}, {"filter", kFilter}};
constexpr Mode kFilters[] = {
    {"none", kNone}, {"ema", kEma}, {"highpass", kHighpass}, {"projection", kProjection}, {"cosine_gate", kCosineGate},
    {"ma", kMa}};

struct Numbers {
  double lr, beta1, beta2, eps, weight_decay, alpha, lamb, after_step, maximize, weight_ema, dampening, nesterov,
      warmup, proj_eps;
};
struct Number {
  const char* name;
  double Numbers::* at;
};
constexpr Number kNumbers[] = {{"lr", &Numbers::lr},
                               {"beta1", &Numbers::beta1},
                               {"beta2", &Numbers::beta2},
                               {"eps", &Numbers::eps},
                               {"weight_decay", &Numbers::weight_decay},
                               {"alpha", &Numbers::alpha},
                               {"lamb", &Numbers::lamb},
                               {"after_step", &Numbers::after_step},
                               {"maximize", &Numbers::maximize},
                               {"weight_ema", &Numbers::weight_ema},
                               {"dampening", &Numbers::dampening},
                               {"nesterov", &Numbers::nesterov},
                               {"warmup", &Numbers::warmup},
                               {"proj_eps", &Numbers::proj_eps}};
static_assert(sizeof(Numbers) == std::size(kNumbers) * sizeof(double), "every number has its name in the table");

// As Vocabulary.parse of trm_fast/ops/_adaptive_settings.py reads it.
inline std::string known() {
  std::string text;
  for (const Mode& rule : kRules) text += std::string(rule.name) + "=" + std::to_string(rule.number) + " ";
  text += ";";
  for (const Mode& filter : kFilters) text += std::string(filter.name) + "=" + std::to_string(filter.number) + " ";
  text += ";";
  for (const Number& number : kNumbers) text += std::string(number.name) + " ";
  return text;
}

template <size_t kCount>
bool is_in(const Mode (&modes)[kCount], int64_t number) {
  for (const Mode& mode : modes) {
    if (mode.number == number) return true;
  }
  return false;
}

// Scalars that lie in memory, float32, because the host must not wait for them; null where absent.
struct Addresses {
  const float *lr, *weight_decay, *lamb, *grad_scale, *found_inf, *clip;
};

inline const float* address(const std::optional<torch::stable::Tensor>& scalar, bool on_gpu) {
  if (!scalar) return nullptr;
  STD_TORCH_CHECK(scalar->is_cuda() == on_gpu && trm_fast::is_flat(*scalar, torch::headeronly::ScalarType::Float, 1),
                  "adaptive_step: a scalar in memory must be one float32 on the device of the step");
  return scalar->const_data_ptr<float>();
}

// All scalars of a call, checked.
struct Settings {
  Rule rule;
  Filter filter;
  Numbers number;
  Addresses at;
};

inline Settings make_settings(int64_t rule, int64_t filter, const std::vector<double>& numbers, const Addresses& at) {
  STD_TORCH_CHECK(is_in(kRules, rule), "adaptive_step: there is no rule of number ", rule);
  STD_TORCH_CHECK(is_in(kFilters, filter), "adaptive_step: there is no filter of number ", filter);
  STD_TORCH_CHECK(numbers.size() == std::size(kNumbers), "adaptive_step: there must be ", std::size(kNumbers),
                  " numbers; got ", numbers.size());
  Settings settings{static_cast<Rule>(rule), static_cast<Filter>(filter), {}, at};
  for (size_t i = 0; i < numbers.size(); ++i) settings.number.*kNumbers[i].at = numbers[i];
  return settings;
}

enum class Rest { kDivide, kAngle, kDescend, kWrite };  // of a step, behind the filter

inline Rest rest_of(Rule rule) {
  switch (rule) {
    case kAdamW:
    case kAdam:
      return Rest::kDivide;
    case kATan2:
      return Rest::kAngle;
    case kSgd:
      return Rest::kDescend;
    case kMomentum:
    case kFilter:
      return Rest::kWrite;
  }
  throw std::logic_error("adaptive_step: there is no such rule");
}

}  // namespace adaptive_step
