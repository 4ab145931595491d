// The meaning is in trm_fast/ops/stablemax_cross_entropy.py.
//
// Tokens are shared out in one parallel_for, then each sequence adds up its own, so the result does not depend on the
// number of threads. A small vocabulary is turned, so that a register holds the same column of 16 tokens; a large one
// is read along the row, with sums of 1024 in float32 lanes and sums of these in double.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/cpu_floats.h"
#include "common/parallel.h"
#include "common/per_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {
using namespace trm_fast;

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 1024;       // of a row
constexpr int64_t kTokens = 64;        // that are turned together
constexpr int64_t kSmall = 32;         // columns that are turned: kTokens of them fill 8 KB
constexpr int64_t kGrain = 16 * 1024;  // logits per thread; a fork costs about as much as their work
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// exp(x) for x <= 0 to 2 ulp, in operations that are vectorised; 0 where it is below the normal numbers.
inline float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const uint32_t bits = (bits_of(shifted) << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

struct Stablemax {
  static float width(float v) { return 1.0f + std::fabs(v); }
  // s(v) / s(top) in one division of numbers that are exact where s is not.
  static float ratio(float v, float top, float top_width) {
    const float wide = width(v);
    const float above = top < 0 ? top_width : v < 0 ? 1.0f : wide;
    const float below = top < 0 ? wide : v < 0 ? wide * top_width : top_width;
    return above / below;
  }
  static float log_ratio(float top, float v, float others) {
    const float quotient = 1.0f / ratio(v, top, width(top));
    const float whole = quotient * (1.0f + others);
    if (whole < std::numeric_limits<float>::max()) return std::log(whole);
    return std::copysign(std::log1p(std::fabs(top)), top) - std::copysign(std::log1p(std::fabs(v)), v) +
           std::log1p(others);
  }
};

struct Softmax {
  static float width(float) { return 1.0f; }
  static float ratio(float v, float top, float) { return exp_of_negative(v - top); }
  static float log_ratio(float top, float v, float others) { return (top - v) + std::log1p(others); }
};

// Also where v is the first NaN, and never after it.
inline bool exceeds(float v, float top) { return !(v <= top) & (top == top); }

struct Logits {
  const char* data;
  int64_t length, vocabulary, stride;  // between sequences
  int64_t dtype;
  // Consecutive values as float32.
  const float* load(int64_t sequence, int64_t token, int64_t column, int64_t size, float* buffer) const {
    const int64_t first = sequence * stride + token * vocabulary + column;
    return trm_fast::load(reinterpret_cast<int64_t>(data), dtype, first, size, buffer);
  }
};

struct Top {
  float value;
  int64_t index;
};

PER_CPU void turn(float* __restrict__ columns, const float* __restrict__ rows, int64_t tokens, int64_t vocabulary) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < vocabulary; ++k) columns[k * kTokens + t] = rows[t * vocabulary + k];
  }
}

// Largest logit, its index and the sum of the other ratios, of each token of a turned block.
template <class Kind>
PER_CPU void reduce_columns(const float* __restrict__ columns, int64_t vocabulary, float* __restrict__ top,
                            int32_t* __restrict__ index, float* __restrict__ others) {
  for (int64_t t = 0; t < kTokens; ++t) {
    top[t] = columns[t];
    index[t] = 0;
    others[t] = 0;
  }
  for (int64_t k = 1; k < vocabulary; ++k) {
    const float* __restrict__ column = columns + k * kTokens;
    for (int64_t t = 0; t < kTokens; ++t) {
      const bool better = exceeds(column[t], top[t]);
      top[t] = better ? column[t] : top[t];
      index[t] = better ? static_cast<int32_t>(k) : index[t];
    }
  }
  for (int64_t k = 0; k < vocabulary; ++k) {
    const float* __restrict__ column = columns + k * kTokens;
    for (int64_t t = 0; t < kTokens; ++t) {
      const float ratio = Kind::ratio(column[t], top[t], Kind::width(top[t]));
      others[t] += index[t] == k ? 0.0f : ratio;
    }
  }
}

PER_CPU float largest(const float* __restrict__ row, int64_t size) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = row[i < size ? i : 0];
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = exceeds(row[first + i], lanes[i]) ? row[first + i] : lanes[i];
  }
  for (; first < size; ++first) lanes[0] = exceeds(row[first], lanes[0]) ? row[first] : lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) lanes[0] = exceeds(lanes[i], lanes[0]) ? lanes[i] : lanes[0];
  return lanes[0];
}

template <class Kind>
PER_CPU float sum_of_ratios(const float* __restrict__ row, int64_t size, float top) {
  const float width = Kind::width(top);
  float lanes[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += Kind::ratio(row[first + i], top, width);
  }
  for (; first < size; ++first) lanes[first % kLanes] += Kind::ratio(row[first], top, width);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The same of one token along its row.
template <class Kind>
void reduce_row(const Logits& logits, int64_t sequence, int64_t token, Top& top, float& others) {
  alignas(64) float buffer[kChunk];
  const int64_t vocabulary = logits.vocabulary;
  top = {0, -1};
  for (int64_t first = 0; first < vocabulary; first += kChunk) {
    const int64_t size = std::min(kChunk, vocabulary - first);
    const float* row = logits.load(sequence, token, first, size, buffer);
    const float value = largest(row, size);
    if (top.index >= 0 && !exceeds(value, top.value)) continue;
    const auto found = [&](float v) { return v == value || (v != v && value != value); };
    top = {value, first + (std::find_if(row, row + size, found) - row)};
  }
  double sum = 0;
  for (int64_t first = 0; first < vocabulary; first += kChunk) {
    const int64_t size = std::min(kChunk, vocabulary - first), at = top.index - first;
    const float* row = logits.load(sequence, token, first, size, buffer);
    if (at < 0 || at >= size) {
      sum += sum_of_ratios<Kind>(row, size, top.value);
    } else {
      sum += sum_of_ratios<Kind>(row, at, top.value);
      sum += sum_of_ratios<Kind>(row + at + 1, size - at - 1, top.value);
    }
  }
  others = static_cast<float>(sum);
}

struct Tokens {
  const int64_t* labels;
  int64_t* predictions;
  float* others;
  float* losses;
  int64_t ignored;
};

// What remains of one token once its row is reduced; `at` gives a logit by its column.
template <class Kind, class At>
void finish(const Tokens& tokens, int64_t place, int64_t vocabulary, Top top, float others, const At& at) {
  const int64_t label = tokens.labels[place];
  tokens.predictions[place] = top.index;
  if (label == tokens.ignored) {
    tokens.others[place] = tokens.losses[place] = 0;
    return;
  }
  const bool inside = label >= 0 && label < vocabulary;
  others = inside ? others + (top.value - top.value) : kNaN;
  const bool known = inside && label != top.index && others == others;
  tokens.others[place] = others;
  tokens.losses[place] = known ? Kind::log_ratio(top.value, at(label), others) : std::log1p(others);
}

template <class Kind>
void forward_small(const Logits& logits, const Tokens& tokens, int64_t sequence, int64_t first, int64_t count) {
  alignas(64) float buffer[kTokens * kSmall], columns[kTokens * kSmall], top[kTokens], others[kTokens];
  alignas(64) int32_t index[kTokens];
  const int64_t vocabulary = logits.vocabulary;
  const float* rows = logits.load(sequence, first, 0, count * vocabulary, buffer);
  std::fill(columns, columns + vocabulary * kTokens, 0.0f);
  turn(columns, rows, count, vocabulary);
  reduce_columns<Kind>(columns, vocabulary, top, index, others);
  for (int64_t t = 0; t < count; ++t) {
    finish<Kind>(tokens, sequence * logits.length + first + t, vocabulary, {top[t], index[t]}, others[t],
                 [&](int64_t column) { return rows[t * vocabulary + column]; });
  }
}

template <class Kind>
void forward_large(const Logits& logits, const Tokens& tokens, int64_t sequence, int64_t token) {
  Top top;
  float others, buffer[1];
  reduce_row<Kind>(logits, sequence, token, top, others);
  finish<Kind>(tokens, sequence * logits.length + token, logits.vocabulary, top, others,
               [&](int64_t column) { return *logits.load(sequence, token, column, 1, buffer); });
}

// Shares out blocks of up to kTokens tokens that do not cross sequences: task(sequence, first, count).
template <class Task>
void for_each_block(int64_t batch, const Logits& logits, const Task& task) {
  const int64_t blocks = (logits.length + kTokens - 1) / kTokens;
  const int64_t work = kTokens * logits.vocabulary;
  trm_fast::parallel_for(0, batch * blocks, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kTokens;
      task(i / blocks, first, std::min(kTokens, logits.length - first));
    }
  });
}

int64_t storage_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float ? kFloat32 : type == ScalarType::BFloat16 ? kBFloat16 : kFloat16;
}

Logits logits_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3, "stablemax_cross_entropy: logits must be [batch, length, vocabulary]");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "stablemax_cross_entropy: logits must be float32, bfloat16 or float16");
  const int64_t length = tensor.size(1), vocabulary = tensor.size(2);
  STD_TORCH_CHECK(vocabulary > 0, "stablemax_cross_entropy: the vocabulary must not be empty");
  // Nothing is read of what is empty, whatever its strides.
  const bool side_by_side =
      (vocabulary == 1 || tensor.stride(2) == 1) && (length == 1 || tensor.stride(1) == vocabulary);
  STD_TORCH_CHECK(tensor.numel() == 0 || side_by_side, "stablemax_cross_entropy: tokens must lie side by side");
  return {static_cast<const char*>(tensor.data_ptr()), length, vocabulary, tensor.stride(0), storage_of(tensor)};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Kind>
void forward(const Logits& logits, const Tokens& tokens, int64_t batch) {
  for_each_block(batch, logits, [&](int64_t sequence, int64_t first, int64_t count) {
    if (logits.vocabulary <= kSmall) return forward_small<Kind>(logits, tokens, sequence, first, count);
    for (int64_t t = first; t < first + count; ++t) forward_large<Kind>(logits, tokens, sequence, t);
  });
}

Outputs cross_entropy_forward(Tensor given, Tensor labels, int64_t ignore_index, bool stablemax) {
  const Logits logits = logits_of(given);
  const int64_t batch = given.size(0), length = logits.length;
  STD_TORCH_CHECK(trm_fast::is_plain(labels, ScalarType::Long, {batch, length}),
                  "stablemax_cross_entropy: labels must be contiguous int64 of the batch and length of the logits");
  Tensor loss = torch::stable::empty({batch}, ScalarType::Float);
  Tensor predictions = torch::stable::empty({batch, length}, ScalarType::Long);
  Tensor correct = torch::stable::empty({batch}, ScalarType::Long);
  Tensor valid = torch::stable::empty({batch}, ScalarType::Long);
  Tensor exact = torch::stable::empty({batch}, ScalarType::Bool);
  Tensor others = torch::stable::empty({batch, length}, ScalarType::Float);
  Tensor outside = torch::stable::empty({}, ScalarType::Bool);
  std::vector<float> losses(batch * length);
  const Tokens tokens{static_cast<const int64_t*>(labels.data_ptr()), static_cast<int64_t*>(predictions.data_ptr()),
                      static_cast<float*>(others.data_ptr()), losses.data(), ignore_index};
  stablemax ? forward<Stablemax>(logits, tokens, batch) : forward<Softmax>(logits, tokens, batch);

  bool any_outside = false;
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0;
    int64_t right = 0, counted = 0;
    for (int64_t t = b * length; t < (b + 1) * length; ++t) {
      const int64_t label = tokens.labels[t];
      const bool is_valid = label != ignore_index;
      sum += losses[t];
      counted += is_valid;
      right += is_valid && label == tokens.predictions[t];
      any_outside |= is_valid && (label < 0 || label >= logits.vocabulary);
    }
    static_cast<float*>(loss.data_ptr())[b] = static_cast<float>(sum / std::max<int64_t>(counted, 1));
    static_cast<int64_t*>(correct.data_ptr())[b] = right;
    static_cast<int64_t*>(valid.data_ptr())[b] = counted;
    static_cast<bool*>(exact.data_ptr())[b] = counted > 0 && right == counted;
  }
  *static_cast<bool*>(outside.data_ptr()) = any_outside;
  return {loss, predictions, correct, valid, exact, others, outside};
}

// out <- scale * s(v) / s(top) * h(v), which is right for all columns but the label's.
template <class Kind>
PER_CPU void gradients(float* __restrict__ out, const float* __restrict__ row, int64_t size, float top, float scale) {
  const float width = Kind::width(top);
  for (int64_t k = 0; k < size; ++k) out[k] = scale * Kind::ratio(row[k], top, width) / Kind::width(row[k]);
}

PER_CPU void narrow(BFloat16* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = bits_of(in[i]);
    out[i].bits = static_cast<uint16_t>(in[i] != in[i] ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

PER_CPU void narrow(uint16_t* __restrict__ out, const float* __restrict__ in, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(in[i]);
}

void store(char* out, int64_t dtype, const float* in, int64_t size) {
  if (dtype == kFloat32) std::memcpy(out, in, size * sizeof(float));
  if (dtype == kBFloat16) narrow(reinterpret_cast<BFloat16*>(out), in, size);
  if (dtype == kFloat16) narrow(reinterpret_cast<uint16_t*>(out), in, size);
}

template <class Kind>
void backward_token(const Logits& logits, int64_t sequence, int64_t token, Top top, int64_t label, float others,
                    float grad, char* out) {
  alignas(64) float buffer[kChunk], results[kChunk];
  const float scale = grad / (1.0f + others);
  for (int64_t first = 0; first < logits.vocabulary; first += kChunk) {
    const int64_t size = std::min(kChunk, logits.vocabulary - first), at = label - first;
    const float* row = logits.load(sequence, token, first, size, buffer);
    gradients<Kind>(results, row, size, top.value, scale);
    if (at >= 0 && at < size) {
      const float ratio = Kind::ratio(row[at], top.value, Kind::width(top.value));
      // p - 1, where p may be 1 but for little; the ratio of the top is exactly 1.
      results[at] = -scale * (others + (1.0f - ratio)) / Kind::width(row[at]);
    }
    store(out + first * (logits.dtype == kFloat32 ? 4 : 2), logits.dtype, results, size);
  }
}

template <class Kind>
void backward(const Logits& logits, const Tokens& tokens, int64_t batch, const float* grads, const int64_t* valid,
              char* out) {
  const int64_t row_bytes = logits.vocabulary * (logits.dtype == kFloat32 ? 4 : 2);
  for_each_block(batch, logits, [&](int64_t sequence, int64_t first, int64_t count) {
    const float grad = grads[sequence] / static_cast<float>(std::max<int64_t>(valid[sequence], 1));
    for (int64_t t = first; t < first + count; ++t) {
      const int64_t place = sequence * logits.length + t, label = tokens.labels[place];
      char* row = out + place * row_bytes;
      if (label == tokens.ignored) {
        std::memset(row, 0, row_bytes);
        continue;
      }
      float buffer[1];
      const int64_t index = tokens.predictions[place];
      const Top top{*logits.load(sequence, t, index, 1, buffer), index};
      backward_token<Kind>(logits, sequence, t, top, label, tokens.others[place], grad, row);
    }
  });
}

Tensor cross_entropy_backward(Tensor grad, Tensor given, Tensor labels, Tensor predictions, Tensor others, Tensor valid,
                              int64_t ignore_index, bool stablemax) {
  const Logits logits = logits_of(given);
  const int64_t batch = given.size(0), length = logits.length;
  bool fits = trm_fast::is_plain(grad, ScalarType::Float, {batch}) &&
              trm_fast::is_plain(valid, ScalarType::Long, {batch}) &&
              trm_fast::is_plain(labels, ScalarType::Long, {batch, length}) &&
              trm_fast::is_plain(predictions, ScalarType::Long, {batch, length}) &&
              trm_fast::is_plain(others, ScalarType::Float, {batch, length});
  const auto* index = fits ? static_cast<const int64_t*>(predictions.data_ptr()) : nullptr;
  for (int64_t i = 0; fits && i < batch * length; ++i) fits = index[i] >= 0 && index[i] < logits.vocabulary;
  STD_TORCH_CHECK(fits, "stablemax_cross_entropy: needs what its forward pass has given, and one gradient each");
  Tensor out = torch::stable::empty({given.size(0), logits.length, logits.vocabulary}, given.scalar_type());
  const Tokens tokens{static_cast<const int64_t*>(labels.data_ptr()), static_cast<int64_t*>(predictions.data_ptr()),
                      static_cast<float*>(others.data_ptr()), nullptr, ignore_index};
  const auto run = stablemax ? backward<Stablemax> : backward<Softmax>;
  run(logits, tokens, given.size(0), static_cast<const float*>(grad.data_ptr()),
      static_cast<const int64_t*>(valid.data_ptr()), static_cast<char*>(out.data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) {
  m.impl("stablemax_cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("stablemax_cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}
