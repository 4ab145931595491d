// The meaning is in trm_fast/ops/rms_norm_residual.py, where r is what is called rstd here.
//
// A task is some rows, or, where the scale runs over the sequence, some channels of one sample. It walks its elements
// twice, the second time out of the cache, in pieces of up to kPiece consecutive elements: widened to float32, combined
// in plain loops, narrowed once. Tasks depend on the sizes alone, so the number of threads changes no bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/cpu_floats.h"
#include "common/parallel.h"
#include "common/per_cpu.h"

using torch::stable::Tensor;

namespace {
using namespace trm_fast;

constexpr int64_t kPiece = 512;        // elements; the buffers of a task stay in the first-level cache
constexpr int64_t kLanes = 64;         // four registers of 16: an addition takes four cycles
constexpr int64_t kMostTasks = 256;    // of rows: bounds the partial sums of the weight's gradient
constexpr int64_t kLeastRows = 16;     // of a task, for the same reason
constexpr int64_t kGrain = 1 << 14;    // elements per thread; a fork costs about as much as their work
constexpr int64_t kFewSummands = 128;  // in one float32; sums of them go on in double

PER_CPU void add(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

PER_CPU void add(float* __restrict__ out, const BFloat16* __restrict__ a, const BFloat16* __restrict__ b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(a[i]) + widen(b[i]);
}

PER_CPU void multiply(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

PER_CPU void scale(float* __restrict__ out, const float* __restrict__ a, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * factor;
}

// Either array may be the other.
PER_CPU double dot(const float* a, const float* b, int64_t n) {
  float lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += a[i] * b[i];
  // In pairs: one after the other would take as long as everything before.
  for (int64_t k = 0; k < 32; ++k) lanes[k] += lanes[k + 32];
  for (int64_t k = 0; k < 16; ++k) lanes[k] += lanes[k + 16];
  for (int64_t k = 0; k < 8; ++k) lanes[k] += lanes[k + 8];
  for (int64_t k = 0; k < 4; ++k) lanes[k] += lanes[k + 4];
  return double{lanes[0] + lanes[1]} + double{lanes[2] + lanes[3]};
}

// sums += factor * a * b; a may be b
PER_CPU void add_products(float* __restrict__ sums, const float* a, const float* b, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += factor * a[i] * b[i];
}

PER_CPU void add_to_double(double* __restrict__ sums, float* __restrict__ part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += part[i];
    part[i] = 0;
  }
}

// out <- a * gain - b * pull, with one gain and pull for all
PER_CPU void combine(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, float gain,
                     float pull, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * gain - b[i] * pull;
}

// out <- factor * a * gain - b * pull, with a gain and a pull for each
PER_CPU void combine_each(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b,
                          float factor, const float* __restrict__ gain, const float* __restrict__ pull, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = factor * a[i] * gain[i] - b[i] * pull[i];
}

PER_CPU void narrow(BFloat16* __restrict__ out, const float* __restrict__ in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(in[i]);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[i].bits = static_cast<uint16_t>(in[i] != in[i] ? 0x7fc0 : nearest);
  }
}

// An array of float32 or bfloat16, or none.
struct Array {
  int64_t address = 0;
  int64_t dtype = kFloat32;

  Array() = default;
  explicit Array(const Tensor& tensor)
      : address(reinterpret_cast<int64_t>(tensor.data_ptr())),
        dtype(tensor.scalar_type() == torch::headeronly::ScalarType::Float ? kFloat32 : kBFloat16) {}
  explicit Array(const std::optional<Tensor>& tensor) : Array(tensor ? Array(*tensor) : Array()) {}

  explicit operator bool() const { return address != 0; }
  template <class Element>
  Element* at(int64_t first) const {
    return reinterpret_cast<Element*>(address) + first;
  }
  const float* read(int64_t first, int64_t n, float* buffer) const { return load(address, dtype, first, n, buffer); }
  // Where to compute what `write` then stores.
  float* target(int64_t first, float* buffer) const { return dtype == kFloat32 ? at<float>(first) : buffer; }
  void write(int64_t first, int64_t n, const float* values) const {
    if (dtype == kBFloat16) narrow(at<BFloat16>(first), values, n);
  }
};

// A tensor as samples x size x kept: the mean runs over `size`. Rows are one sample in which `size` lies innermost.
struct Shape {
  bool rows;
  int64_t samples, size, kept;

  Shape(const Tensor& x, int64_t dim) : rows(dim == -1), size(x.size(x.dim() + dim)) {
    const int64_t elements = x.numel();
    kept = rows ? (size ? elements / size : 0) : x.size(x.dim() - 1);
    samples = rows ? 1 : (elements ? elements / (size * kept) : 0);
    if (elements == 0) samples = kept = 0;
  }
  int64_t width() const { return rows ? std::max(kLeastRows, (kept + kMostTasks - 1) / kMostTasks) : kPiece; }
  int64_t tasks_of_sample() const { return (kept + width() - 1) / width(); }
  int64_t tasks() const { return samples * tasks_of_sample(); }
};

// What a task works on: elements [first, first + count) of the kept dimension of a sample.
struct Task {
  int64_t sample, first, count;
  Task(const Shape& shape, int64_t index)
      : sample(index / shape.tasks_of_sample()), first(index % shape.tasks_of_sample() * shape.width()) {
    count = std::min(shape.width(), shape.kept - first);
  }
};

template <class Work>
void for_each_task(const Shape& shape, const Work& work) {
  const int64_t elements = shape.width() * std::max<int64_t>(1, shape.size);
  const int64_t grain = std::max<int64_t>(1, kGrain / elements);
  trm_fast::parallel_for(0, shape.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task);
  });
}

// h = x + residual
struct Summands {
  Array x, residual;

  const float* read(int64_t first, int64_t n, float (*buffers)[kPiece]) const {
    if (!residual) return x.read(first, n, buffers[0]);
    if (x.dtype == kFloat32) add(buffers[1], x.at<float>(first), residual.at<float>(first), n);
    if (x.dtype == kBFloat16) add(buffers[1], x.at<BFloat16>(first), residual.at<BFloat16>(first), n);
    return buffers[1];
  }
};

struct Forward {
  Shape shape;
  Summands summands;
  Array out, sum;
  const float* weight;
  float* rstd;
  double eps;

  float inverse(double squares) const { return static_cast<float>(1.0 / std::sqrt(squares / shape.size + eps)); }

  // The first walk stores the rounded sum, if it is wanted, and both walks take that.
  const float* first_read(int64_t first, int64_t n, float (*buffers)[kPiece]) const {
    const float* h = summands.read(first, n, buffers);
    if (!sum) return h;
    if (sum.dtype == kFloat32) std::copy(h, h + n, sum.target(first, nullptr));
    sum.write(first, n, h);
    return sum.read(first, n, buffers[1]);
  }
  const float* second_read(int64_t first, int64_t n, float (*buffers)[kPiece]) const {
    return sum ? sum.read(first, n, buffers[1]) : summands.read(first, n, buffers);
  }

  void row(int64_t row) const {
    alignas(64) float buffers[4][kPiece];
    const int64_t begin = row * shape.size;
    const float* h = nullptr;
    double squares = 0;
    for (int64_t r = 0; r < shape.size; r += kPiece) {
      const int64_t n = std::min(kPiece, shape.size - r);
      h = first_read(begin + r, n, buffers);
      squares += dot(h, h, n);
    }
    rstd[row] = inverse(squares);
    for (int64_t r = 0; r < shape.size; r += kPiece) {
      const int64_t n = std::min(kPiece, shape.size - r);
      if (shape.size > kPiece) h = second_read(begin + r, n, buffers);
      float* target = out.target(begin + r, buffers[3]);
      scale(weight != nullptr ? buffers[2] : target, h, rstd[row], n);
      if (weight != nullptr) multiply(target, buffers[2], weight + r, n);
      out.write(begin + r, n, target);
    }
  }

  void channels(const Task& task) const {
    alignas(64) float buffers[4][kPiece], part[kPiece] = {}, factors[kPiece];
    double squares[kPiece] = {};
    const int64_t begin = task.sample * shape.size * shape.kept + task.first, n = task.count;
    for (int64_t r = 0; r < shape.size; ++r) {
      const float* h = first_read(begin + r * shape.kept, n, buffers);
      add_products(part, h, h, 1.0f, n);
      if ((r + 1) % kFewSummands == 0) add_to_double(squares, part, n);
    }
    add_to_double(squares, part, n);
    float* inverses = rstd + task.sample * shape.kept + task.first;
    for (int64_t i = 0; i < n; ++i) inverses[i] = inverse(squares[i]);
    for (int64_t r = 0; r < shape.size; ++r) {
      const int64_t first = begin + r * shape.kept;
      const float* by = inverses;
      if (weight != nullptr) {
        scale(factors, inverses, weight[r], n);
        by = factors;
      }
      float* target = out.target(first, buffers[3]);
      multiply(target, second_read(first, n, buffers), by, n);
      out.write(first, n, target);
    }
  }
};

struct Backward {
  Shape shape;
  Summands summands;  // h, or h * rstd, which the forward returned, if `normalised`
  Array dout, dsum, dx;
  const float *weight, *rstd;
  bool normalised;
  float* parts;  // of the weight's gradient, one row for each task

  // dx = rstd * g - pull(sum of g * h) * h, where g = weight * dout and h still lacks its scale unless normalised
  float pull(double sum, float inverse) const {
    const double scale = normalised ? 1.0 : double{inverse} * inverse;
    return static_cast<float>(inverse * scale * sum / shape.size);
  }

  // Stores what `compute` writes, plus the gradient of the sum. `free` may be overwritten after `compute`.
  template <class Compute>
  void store(int64_t first, int64_t n, float* buffer, float* before, float* free, const Compute& compute) const {
    float* target = dx.target(first, buffer);
    compute(dsum ? before : target);
    if (dsum) add(target, before, dsum.read(first, n, free), n);
    dx.write(first, n, target);
  }

  void row(int64_t row, float* part) const {
    alignas(64) float buffers[3][kPiece], given[kPiece], weighted[kPiece], result[kPiece];
    const int64_t begin = row * shape.size;
    const float *d = nullptr, *g = nullptr, *h = nullptr;
    const auto read = [&](int64_t r, int64_t n) {
      h = summands.read(begin + r, n, buffers);
      g = d = dout.read(begin + r, n, given);
      if (weight == nullptr) return;
      multiply(weighted, d, weight + r, n);
      g = weighted;
    };
    double sum = 0;
    for (int64_t r = 0; r < shape.size; r += kPiece) {
      const int64_t n = std::min(kPiece, shape.size - r);
      read(r, n);
      if (part != nullptr) add_products(part + r, d, h, normalised ? 1.0f : rstd[row], n);
      sum += dot(g, h, n);
    }
    for (int64_t r = 0; r < shape.size; r += kPiece) {
      const int64_t n = std::min(kPiece, shape.size - r);
      if (shape.size > kPiece) read(r, n);
      store(begin + r, n, result, buffers[2], given,
            [&](float* to) { combine(to, g, h, rstd[row], pull(sum, rstd[row]), n); });
    }
  }

  void channels(const Task& task, float* part) const {
    alignas(64) float buffers[3][kPiece], given[kPiece], result[kPiece], few[kPiece] = {}, pulls[kPiece];
    double sums[kPiece] = {};
    const int64_t begin = task.sample * shape.size * shape.kept + task.first, n = task.count;
    const float* inverses = rstd + task.sample * shape.kept + task.first;
    for (int64_t r = 0; r < shape.size; ++r) {
      const float* h = summands.read(begin + r * shape.kept, n, buffers);
      const float* g = dout.read(begin + r * shape.kept, n, given);
      add_products(few, g, h, weight != nullptr ? weight[r] : 1.0f, n);
      if ((r + 1) % kFewSummands == 0) add_to_double(sums, few, n);
      if (part != nullptr) {
        if (!normalised) {
          multiply(result, h, inverses, n);
          h = result;
        }
        part[r] = static_cast<float>(dot(g, h, n));
      }
    }
    add_to_double(sums, few, n);
    for (int64_t i = 0; i < n; ++i) pulls[i] = pull(sums[i], inverses[i]);
    for (int64_t r = 0; r < shape.size; ++r) {
      const int64_t first = begin + r * shape.kept;
      const float* h = summands.read(first, n, buffers);
      const float* g = dout.read(first, n, given);
      const float factor = weight != nullptr ? weight[r] : 1.0f;
      store(first, n, result, buffers[2], given,
            [&](float* to) { combine_each(to, g, h, factor, inverses, pulls, n); });
    }
  }
};

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

void check_dim(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK((dim == -1 || dim == -2) && x.dim() + dim >= 0,
                  "rms_norm_residual: dim must be -1 or -2, and a dimension of x; got ", dim);
}

// Sizes that do not fit would write past the end, and no schema forbids them.
void check(const Shape& shape, std::initializer_list<Tensor> full, const Tensor& rstd,
           std::initializer_list<std::optional<Tensor>> vectors) {
  using torch::headeronly::ScalarType;
  const bool empty = shape.samples * shape.kept == 0;
  bool fits = trm_fast::is_flat(rstd, ScalarType::Float, empty ? rstd.numel() : shape.samples * shape.kept);
  const ScalarType type = full.begin()->scalar_type();
  fits = fits && (type == ScalarType::Float || type == ScalarType::BFloat16);
  for (const Tensor& tensor : full) {
    fits = fits && trm_fast::is_flat(tensor, type, shape.samples * shape.size * shape.kept);
  }
  for (const auto& vector : vectors) {
    fits = fits && (!vector || trm_fast::is_plain(*vector, ScalarType::Float, {shape.size}));
  }
  STD_TORCH_CHECK(fits, "rms_norm_residual: needs contiguous float32 or bfloat16 tensors of fitting sizes");
}

void check_memory(std::initializer_list<std::optional<Tensor>> read,
                  std::initializer_list<std::optional<Tensor>> written) {
  trm_fast::Memory memory;
  for (const auto& tensor : read) memory.reads(tensor);
  for (const auto& tensor : written) memory.writes(tensor);
  STD_TORCH_CHECK(memory.is_disjoint(), "rms_norm_residual: needs memory of its own for what it writes");
}

void rms_norm_residual(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight, int64_t dim, double eps,
                       Tensor out, std::optional<Tensor> sum, Tensor rstd) {
  check_dim(x, dim);
  const Shape shape(x, dim);
  check(shape, {x, residual.value_or(x), out, sum.value_or(x)}, rstd, {weight});
  check_memory({x, residual, weight}, {out, sum, rstd});
  const Forward work{shape,          {Array(x), Array(residual)},          Array(out), Array(sum),
                     floats(weight), static_cast<float*>(rstd.data_ptr()), eps};
  for_each_task(shape, [&](int64_t index) {
    const Task task(shape, index);
    if (!shape.rows) return work.channels(task);
    for (int64_t i = 0; i < task.count; ++i) work.row(task.first + i);
  });
}

// Adds up the parts of all tasks in order.
void add_parts(float* out, const std::vector<float>& parts, int64_t tasks, int64_t size) {
  std::vector<double> sums(size, 0.0);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t r = 0; r < size; ++r) sums[r] += parts[task * size + r];
  }
  std::copy(sums.begin(), sums.end(), out);
}

void rms_norm_residual_backward(Tensor dout, std::optional<Tensor> dsum, Tensor x, std::optional<Tensor> residual,
                                std::optional<Tensor> weight, Tensor rstd, int64_t dim, bool normalised, Tensor dx,
                                std::optional<Tensor> dweight) {
  check_dim(x, dim);
  const Shape shape(x, dim);
  check(shape, {dout, dsum.value_or(x), x, residual.value_or(x), dx}, rstd, {weight, dweight});
  check_memory({dout, dsum, x, residual, weight, rstd}, {dx, dweight});
  const int64_t tasks = shape.tasks();
  std::vector<float> parts(dweight ? tasks * shape.size : 0, 0.0f);
  const Backward work{shape,        {Array(x), Array(residual)},
                      Array(dout),  Array(dsum),
                      Array(dx),    floats(weight),
                      floats(rstd), normalised,
                      parts.data()};
  for_each_task(shape, [&](int64_t index) {
    const Task task(shape, index);
    float* part = dweight ? work.parts + index * shape.size : nullptr;
    if (!shape.rows) return work.channels(task, part);
    for (int64_t i = 0; i < task.count; ++i) work.row(task.first + i, part);
  });
  if (dweight) add_parts(static_cast<float*>(dweight->data_ptr()), parts, tasks, shape.size);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) {
  m.impl("rms_norm_residual_", TORCH_BOX(&rms_norm_residual));
  m.impl("rms_norm_residual_backward_", TORCH_BOX(&rms_norm_residual_backward));
}
