// The meaning is in trm_fast/ops/newton_schulz.py.
//
// Products in bfloat16 with sums in float32, by AVX512-BF16. A matrix is read twice, for its norm and into panels, and
// written once; in between it lives in panels (panels.h), once by rows and once by columns, because its two products
// sum along different sides. All n x n matrices are symmetric: one triangle is computed and mirrored as it is stored.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>
#include <vector>

#include "common/checks.h"
#include "common/dtypes.h"
#include "common/parallel.h"

using torch::stable::Tensor;

#if defined(__x86_64__) && defined(__GNUC__)
#include "newton_schulz/product.h"

namespace {
using namespace newton_schulz;

struct Row {
  int64_t address, rows, cols, stride, dtype;

  bool is_empty() const { return rows == 0 || cols == 0; }

  // Rows of the matrix lie apart.
  bool fits() const {
    const bool apart = rows <= 1 || (stride >= cols && product({rows, stride, 4}) >= 0);
    return apart && product({rows, cols, 4}) >= 0 && is_array(address, dtype, kFloat16, !is_empty());
  }
};
constexpr int64_t kColumns = sizeof(Row) / sizeof(int64_t);

struct Settings {
  std::vector<double> coefficients;  // a, b, c of each step
  std::vector<int64_t> cuts;         // 0, the restarts, the number of steps
  double eps;
};

int64_t blocks(int64_t size) { return (size + kSide - 1) / kSide; }

// A fork and a join cost about as much as a thread computes in this number of multiply-adds.
constexpr double kForkCost = 2e6;

// The threads that work on one matrix, each with room for the sums of some panels.
struct Team {
  int64_t threads;
  float* sums;
  int64_t sums_size;  // of one thread

  // Calls task(i, sums) for i in [0, count), each on the next free thread.
  template <class Task>
  void share(int64_t count, const Task& task) const {
    if (threads == 1) {
      for (int64_t i = 0; i < count; ++i) task(i, sums);
      return;
    }
    std::atomic<int64_t> next{0};
    trm_fast::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t i = next++; i < count; i = next++) task(i, sums + thread * sums_size);
      }
    });
  }

  void compute(const Product& product) const {
    const int64_t panels = product.right.count;
    // Of equal width, and as many for each thread.
    int64_t tasks = (panels + kTilePanels - 1) / kTilePanels;
    tasks = std::min(panels, (tasks + threads - 1) / threads * threads);
    share(tasks, [&](int64_t task, float* mine) {
      compute_panels(product, mine, task * panels / tasks, (task + 1) * panels / tasks);
    });
  }
};

AVX512_BF16 double squares(const Matrix& matrix, int64_t block) {
  __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  const int64_t end = std::min(matrix.rows, (block + 1) * kSide);
  for (int64_t row = block * kSide; row < end; ++row) {
    for (int64_t col = 0; col < matrix.cols; col += kSide) {
      const __m512 x = load_row(matrix.at(row, col), matrix.dtype, lanes(matrix.cols - col));
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      sums[0] = _mm512_fmadd_pd(low, low, sums[0]);
      sums[1] = _mm512_fmadd_pd(high, high, sums[1]);
    }
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
}

// Multiplies in float64, as the reciprocal of a norm may leave the range of float32.
AVX512_BF16 __m512 scaled(__m512 x, __m512d scale) {
  const __m512d low = _mm512_mul_pd(scale, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
  const __m512d high = _mm512_mul_pd(scale, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

// One row of blocks of the caller's matrix; what lies beyond its edge is zero.
AVX512_BF16 void pack(const Matrix& matrix, int64_t i, double scale, const Panels& by_columns, const Panels& by_rows) {
  const int64_t count = std::min(kSide, matrix.rows - i * kSide);
  for (int64_t j = 0; j < by_columns.count; ++j) {
    const __mmask16 mask = lanes(matrix.cols - j * kSide);
    __m512 rows[kSide];
    for (int64_t r = 0; r < kSide; ++r) {
      rows[r] = r < count ? load_row(matrix.at(i * kSide + r, j * kSide), matrix.dtype, mask) : _mm512_setzero_ps();
      rows[r] = scaled(rows[r], _mm512_set1_pd(scale));
    }
    store_block(by_columns.at(j, i), rows);
    store_mirrored(by_rows.at(i, j), rows);
  }
}

AVX512_BF16 void scale_panel(const Panels& out, const Panels& in, int64_t panel, float gain) {
  const __m512 factor = _mm512_set1_ps(gain);
  for (int64_t block = 0; block < in.blocks; ++block) {
    __m512 rows[kSide];
    for (int p = 0; p < kSide / 2; ++p) {
      const __m512i words = _mm512_load_si512(in.at(panel, block) + p * kSide);
      rows[2 * p] = _mm512_mul_ps(factor, even_row(words));
      rows[2 * p + 1] = _mm512_mul_ps(factor, odd_row(words));
    }
    store_block(out.at(panel, block), rows);
  }
}

float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void add_to_diagonal(const Panels& square, float value) {
  for (int64_t i = 0; i < square.count * kSide; ++i) {
    const int64_t row = i % kSide;
    uint16_t* words = reinterpret_cast<uint16_t*>(square.at(i / kSide, i / kSide) + row / 2 * kSide + row);
    words[row % 2] = rounded(widened(words[row % 2]) + value);
  }
}

int64_t words_of_panels(int64_t n, int64_t m) { return blocks(n) * blocks(m) * kBlockWords; }

// One matrix on its way; n is its shorter side.
class Iteration {
 public:
  static int64_t words(const Row& row) {
    const int64_t n = std::min(row.rows, row.cols), m = std::max(row.rows, row.cols);
    return 2 * words_of_panels(n, m) + 4 * words_of_panels(n, n);
  }

  Iteration(const Row& row, uint32_t* words, const Team& team)
      : team_(team),
        matrix_{reinterpret_cast<char*>(row.address), row.rows, row.cols, 0, row.dtype, row.dtype == kFloat32 ? 4 : 2},
        n_(blocks(std::min(row.rows, row.cols))),
        m_(blocks(std::max(row.rows, row.cols))) {
    matrix_.stride_bytes = row.stride * matrix_.element_bytes;
    const auto take = [&](int64_t count, int64_t rows) {
      const Panels taken{words, count, rows};
      words += count * rows * kBlockWords;
      return taken;
    };
    along_m_ = take(n_, m_);
    along_n_ = take(m_, n_);
    r_ = take(n_, n_);
    z_ = take(n_, n_);
    q_ = take(n_, n_);
    t_ = take(n_, n_);
  }

  void run(const Settings& s) {
    read(s.eps);
    for (size_t k = 0; k + 1 < s.cuts.size(); ++k) {
      const double* triples = s.coefficients.data() + 3 * s.cuts[k];
      multiply_by_polynomial(triples, s.cuts[k + 1] - s.cuts[k], k + 2 == s.cuts.size());
    }
  }

 private:
  void read(double eps) {
    const int64_t count = blocks(matrix_.rows);
    auto* sums = reinterpret_cast<double*>(along_m_.words);  // nothing else is there yet
    team_.share(count, [&](int64_t i, float*) { sums[i] = squares(matrix_, i); });
    const double norm = std::sqrt(std::accumulate(sums, sums + count, 0.0));
    // Written so that a norm that is no number stays one.
    const double scale = 1.0 / (norm < eps ? eps : norm);
    const bool tall = matrix_.rows > matrix_.cols;
    const Panels &by_columns = tall ? along_m_ : along_n_, &by_rows = tall ? along_n_ : along_m_;
    team_.share(count, [&](int64_t i, float*) { pack(matrix_, i, scale, by_columns, by_rows); });
  }

  // X <- (the product of a + b R + c R^2 over the steps) X
  void multiply_by_polynomial(const double* triples, int64_t steps, bool last) {
    team_.compute({along_m_, along_m_, true, 1.0f, nullptr, 0.0f, &r_, &r_, nullptr});
    float alpha = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const auto a = static_cast<float>(triples[3 * step]), b = static_cast<float>(triples[3 * step + 1]),
                 c = static_cast<float>(triples[3 * step + 2]);
      if (c == 0) {
        team_.share(n_, [&](int64_t panel, float*) { scale_panel(z_, r_, panel, b); });
      } else {
        symmetric(z_, c, r_, r_, b, r_);
      }
      if (step > 0) {
        symmetric(t_, 1.0f, q_, z_, a, q_);
        std::swap(t_, q_);
      }
      if (step + 1 < steps) {
        symmetric(t_, 1.0f, r_, z_, a, r_);
        symmetric(r_, 1.0f, z_, t_, a, t_);
      }
      if (step == 0) {
        std::swap(z_, q_);
        // A single step leaves a out of Q, where rounding does not reach it.
        if (steps == 1) alpha = a;
        if (steps > 1) add_to_diagonal(q_, a);
      }
    }
    team_.compute({q_, along_n_, false, 1.0f, alpha == 0 ? nullptr : &along_n_, alpha, &along_n_, &along_m_,
                   last ? &matrix_ : nullptr});
  }

  // out <- gain * left right + weight * source, where all are symmetric
  void symmetric(const Panels& out, float gain, const Panels& left, const Panels& right, float weight,
                 const Panels& source) const {
    team_.compute({left, right, true, gain, &source, weight, &out, &out, nullptr});
  }

  const Team& team_;
  Matrix matrix_;
  int64_t n_, m_;
  Panels along_m_, along_n_;  // X with pairs along its longer and its shorter side
  Panels r_, z_, q_, t_;
};

// Multiply-adds, in the units of the formula on the page.
double cost(const Row& row, const Settings& s) {
  const double n = std::min(row.rows, row.cols), m = std::max(row.rows, row.cols);
  const double segments = s.cuts.size() - 1, steps = s.cuts.back();
  return segments * 3 * n * n * m + (4 * steps - 3 * segments) * n * n * n;
}

int64_t sums_size(const Row& row) { return blocks(std::min(row.rows, row.cols)) * kSide * kSide * kTilePanels; }

// Whether matrices that one thread each works on, longest first, keep all threads busy to the end.
bool balanced(const std::vector<double>& costs, size_t first, int64_t threads) {
  std::vector<double> loads(threads, 0.0);
  for (size_t i = first; i < costs.size(); ++i) *std::min_element(loads.begin(), loads.end()) += costs[i];
  const double total = std::accumulate(loads.begin(), loads.end(), 0.0);
  return *std::max_element(loads.begin(), loads.end()) <= 1.1 * total / threads;
}

// Threads that are worth their forks on one matrix, of which there are about five for each step.
int64_t useful_threads(double cost, const Settings& s, int64_t threads) {
  const double forks = 5.0 * s.cuts.back();
  return std::clamp(static_cast<int64_t>(cost / forks / kForkCost), int64_t{1}, threads);
}

bool newton_schulz_cpu_ready() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

void newton_schulz_rows(Tensor table, std::vector<double> coefficients, std::vector<int64_t> restarts, double eps) {
  STD_TORCH_CHECK(newton_schulz_cpu_ready(), "newton_schulz: needs a CPU with AVX512-BF16");
  STD_TORCH_CHECK(trm_fast::is_table(table, kColumns), "newton_schulz: the table must have ", kColumns,
                  " columns of int64 side by side");
  const auto steps = static_cast<int64_t>(coefficients.size()) / 3;
  bool fits = steps > 0 && coefficients.size() % 3 == 0;
  for (size_t i = 0; i < restarts.size(); ++i) {
    fits = fits && (i > 0 ? restarts[i - 1] : 0) < restarts[i] && restarts[i] < steps;
  }
  STD_TORCH_CHECK(fits, "newton_schulz: there must be three coefficients for each step, and restarts between steps");
  Settings settings{coefficients, {0}, eps};
  settings.cuts.insert(settings.cuts.end(), restarts.begin(), restarts.end());
  settings.cuts.push_back(coefficients.size() / 3);

  const Row* given = static_cast<const Row*>(table.data_ptr());
  STD_TORCH_CHECK(std::all_of(given, given + table.size(0), [](const Row& row) { return row.fits(); }),
                  "newton_schulz: a row of the table must hold an address, sizes, a stride and a dtype");
  std::vector<Row> rows;
  std::copy_if(given, given + table.size(0), std::back_inserter(rows), [](const Row& row) { return !row.is_empty(); });
  std::stable_sort(rows.begin(), rows.end(),
                   [&](const Row& a, const Row& b) { return cost(a, settings) > cost(b, settings); });
  std::vector<double> costs;
  int64_t words = 0, sums = 0;
  for (const Row& row : rows) {
    costs.push_back(cost(row, settings));
    words = std::max(words, Iteration::words(row));
    sums = std::max(sums, sums_size(row));
  }

  // The largest matrices are shared by all threads until the rest can be given out one to each.
  const int64_t threads = torch::stable::get_num_threads();
  size_t shared = 0;
  while (shared < rows.size() && !balanced(costs, shared, threads) &&
         useful_threads(costs[shared], settings, threads) > 1) {
    ++shared;
  }
  const int64_t single = std::min<int64_t>(threads, rows.size() - shared);
  const int64_t size = std::max(words + threads * sums, single * (words + sums));
  Tensor scratch = torch::stable::empty({size + kSide}, torch::headeronly::ScalarType::Int);
  auto* begin = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(scratch.data_ptr()) + 63) / 64 * 64);
  for (size_t i = 0; i < shared; ++i) {
    const Team team{useful_threads(costs[i], settings, threads), reinterpret_cast<float*>(begin + words), sums};
    Iteration(rows[i], begin, team).run(settings);
  }
  std::atomic<size_t> next{shared};
  trm_fast::parallel_for(0, single, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      uint32_t* mine = begin + thread * (words + sums);
      const Team team{1, reinterpret_cast<float*>(mine + words), sums};
      for (size_t i = next++; i < rows.size(); i = next++) Iteration(rows[i], mine, team).run(settings);
    }
  });
}

}  // namespace
#else
namespace {
void newton_schulz_rows(Tensor, std::vector<double>, std::vector<int64_t>, double) {
  STD_TORCH_CHECK(false, "newton_schulz: needs a CPU with AVX512-BF16");
}
bool newton_schulz_cpu_ready() { return false; }
}  // namespace
#endif

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) { m.impl("newton_schulz_rows_", TORCH_BOX(&newton_schulz_rows)); }
STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("newton_schulz_cpu_ready", TORCH_BOX(&newton_schulz_cpu_ready));
}
