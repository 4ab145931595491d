// One block of rows through the whole recursion and back. Its rows are [x | y | z], so that the networks find their
// inputs side by side; an odd last row has a row of zeros behind it, whose gradient is zero.
#pragma once

#include <algorithm>

#include "vector_latent_update/rows.h"

namespace vector_latent_update {

// The recursion as rounds of `steps` updates of z and one of y; the last ones carry gradients.
struct Counts {
  int64_t hidden, rounds, steps, grad_rounds;
  std::vector<float> scales;  // of each round

  int64_t grad_steps() const { return grad_rounds * steps; }
  int64_t updates() const { return grad_steps() + grad_rounds; }  // first those of z, then those of y
  int64_t states() const { return updates() + 1; }
};

// The places of the rows of a chunk, `rows` of them in each slot. One slot per update or state.
template <class E>
struct Slots {
  Panels panels;
  int64_t rows;

  int64_t unit(int64_t slot, int64_t row) const { return (slot * rows + row) / E::kUnit; }
  static Slots take(int64_t count, int64_t rows, int64_t hidden, Arena& arena) {
    return {take_panels<E>(count * rows, hidden, arena), rows};
  }
};

// What the forward pass leaves for the backward pass of one chunk: the states before all updates and the last z, and
// either the insides of all updates or nothing.
template <class E>
struct Saved {
  Slots<E> y, z;
  Slots<E> act_z, act_y;
  typename E::Stored *slope, *normed;  // [updates, rows, hidden], or null
  float* scales;                       // [updates, rows]

  bool has_insides() const { return slope != nullptr; }

  Inside<E> inside(const Counts& counts, int64_t update, int64_t row) const {
    const bool is_y = update >= counts.grad_steps();
    const Slots<E>& act = is_y ? act_y : act_z;
    const int64_t place = update * y.rows + row, unit = act.unit(is_y ? update - counts.grad_steps() : update, row);
    return {act.panels, unit, slope + place * counts.hidden, normed + place * counts.hidden, scales + place};
  }
};

// Both sides of the products that give the gradients of weights; the states are in Saved.
template <class E>
struct Operands {
  Slots<E> x, total, round;     // gradients in front of the gelu of z: of all steps, of each round
  Slots<E> hidden_z, hidden_y;  // of each step
  Slots<E> out_z, out_y;        // in front of the norm
};

struct NetPair {
  Net z, y;
};

// Memory of one thread.
template <class E>
struct Scratch {
  using Stored = typename E::Stored;
  Stored *rows, *act;  // [rows, 3 hidden], [rows, hidden]
  float *x_part, *xy_part, *p;
  float *d, *round, *total;  // [rows, 3 hidden], [rows, hidden]
  Stored *d_out, *d_in, *slope, *normed;
  float* scales;

  Scratch(int64_t rows_, int64_t hidden, bool backward, Arena& arena) {
    const int64_t size = rows_ * hidden;
    rows = arena.take<Stored>(3 * size);
    act = arena.take<Stored>(size);
    for (float** place : {&x_part, &xy_part, &p}) *place = arena.take<float>(size);
    if (!backward) return;
    d = arena.take<float>(3 * size);
    for (float** place : {&round, &total}) *place = arena.take<float>(size);
    for (Stored** place : {&d_out, &d_in, &slope, &normed}) *place = arena.take<Stored>(size);
    scales = arena.take<float>(rows_);
  }
};

// Rows of the caller, of which the block has `count`, and `rows` with the one of zeros.
template <class T>
void load_part(const T* from, int64_t count, int64_t rows, int64_t hidden, T* to) {
  for (int64_t r = 0; r < count; ++r) std::copy_n(from + r * hidden, hidden, to + r * 3 * hidden);
  for (int64_t r = count; r < rows; ++r) std::fill_n(to + r * 3 * hidden, hidden, T(0));
}

template <class T>
void store_part(const T* from, int64_t count, int64_t hidden, T* to) {
  for (int64_t r = 0; r < count; ++r) std::copy_n(from + r * 3 * hidden, hidden, to + r * hidden);
}

template <class E>
class Block {
 public:
  using Stored = typename E::Stored;

  // `first` of the chunk.
  Block(const Counts& counts, const NetPair& nets, const Scratch<E>& scratch, int64_t first, int64_t count)
      : counts_(counts), nets_(nets), s_(scratch), h_(counts.hidden), first_(first), count_(count) {
    rows_ = count + count % 2;
  }

  // x, y and z are those of the first row.
  void forward(const Stored* x, Stored* y, Stored* z, const Saved<E>* saved) {
    load_part(x, count_, rows_, h_, s_.rows);
    load_part(y, count_, rows_, h_, s_.rows + h_);
    load_part(z, count_, rows_, h_, s_.rows + 2 * h_);
    add_x_part();
    for (int64_t round = 0; round < counts_.rounds; ++round) {
      forward_round(round, round - (counts_.rounds - counts_.grad_rounds), saved);
    }
    if (counts_.grad_rounds > 0) keep(2, saved->z, counts_.grad_steps());
    store_part(s_.rows + h_, count_, h_, y);
    store_part(s_.rows + 2 * h_, count_, h_, z);
  }

  // dy and dz are gradients of the results; they become those of the first states of the rounds with gradient.
  AVX512 void backward(const Stored* x, Stored* dx, Stored* dy, Stored* dz, const Saved<E>& saved,
                       const Operands<E>& operands, const VectorSums& sums_z, const VectorSums& sums_y) {
    load_part(x, count_, rows_, h_, s_.rows);
    to_panels<E>(s_.rows, 3 * h_, rows_, h_, operands.x.panels, operands.x.unit(0, first_));
    if (!saved.has_insides()) add_x_part();
    std::fill_n(s_.d, rows_ * 3 * h_, 0.0f);
    std::fill_n(s_.total, rows_ * h_, 0.0f);
    widen(dy, s_.d + h_);
    widen(dz, s_.d + 2 * h_);
    for (int64_t round = counts_.grad_rounds - 1; round >= 0; --round) {
      backward_round(round, saved, operands, sums_z, sums_y);
    }
    round_sums<E>(s_.total, rows_, h_, nullptr, s_.d_in, operands.total.panels, operands.total.unit(0, first_));
    add_back(nets_.z, 0, 0, h_);
    narrow(s_.d, dx);
    narrow(s_.d + h_, dy);
    narrow(s_.d + 2 * h_, dz);
  }

 private:
  const Stored* part(int64_t which) const { return s_.rows + which * h_; }

  void add_x_part() {
    rows_product<E>(left_of<E>(part(0), 3 * h_), rows_, nets_.z.in, 0, h_, 0, h_,
                    AddTo{s_.x_part, h_, nets_.z.in_bias, 0});
  }

  void add_y_part() {
    rows_product<E>(left_of<E>(part(1), 3 * h_), rows_, nets_.z.in, h_, h_, 0, h_,
                    AddTo{s_.xy_part, h_, s_.x_part, h_});
  }

  void keep(int64_t which, const Slots<E>& slots, int64_t slot) {
    to_panels<E>(part(which), 3 * h_, rows_, h_, slots.panels, slots.unit(slot, first_));
  }

  void bring(int64_t which, const Slots<E>& slots, int64_t slot) {
    from_panels<E>(slots.panels, slots.unit(slot, first_), rows_, h_, s_.rows + which * h_, 3 * h_);
  }

  // `grad` counts the rounds with gradient; before them it is negative.
  void forward_round(int64_t round, int64_t grad, const Saved<E>* saved) {
    const float step = counts_.scales[round];
    add_y_part();
    for (int64_t k = 0; k < counts_.steps; ++k) {
      const int64_t update = grad * counts_.steps + k;
      if (grad >= 0) keep(2, saved->z, update);
      update_state(false, step, grad >= 0 ? saved : nullptr, update);
    }
    if (grad >= 0) keep(1, saved->y, grad);
    update_state(true, step, grad >= 0 ? saved : nullptr, counts_.grad_steps() + grad);
  }

  void update_state(bool is_y, float step, const Saved<E>* saved, int64_t update) {
    Stored* state = s_.rows + (is_y ? h_ : 2 * h_);
    if (saved == nullptr || !saved->has_insides()) return run(is_y, step, state, nullptr);
    const Inside<E> inside = saved->inside(counts_, update, first_);
    run(is_y, step, state, &inside);
  }

  void run(bool is_y, float step, Stored* state, const Inside<E>* inside) {
    const Net& net = is_y ? nets_.y : nets_.z;
    const int64_t parts = is_y ? 2 : 1;  // y | z, or z behind what x and y add
    const Gelu<E> gelu{s_.act, h_, is_y ? net.in_bias : s_.xy_part, is_y ? 0 : h_, inside};
    rows_product<E>(left_of<E>(part(3 - parts), 3 * h_), rows_, net.in, is_y ? 0 : 2 * h_, parts * h_, 0, h_, gelu);
    rows_product<E>(left_of<E>(s_.act, h_), rows_, net.out, 0, h_, 0, h_, AddTo{s_.p, h_, net.out_bias, 0});
    norm_rows<E>(s_.p, rows_, h_, net, step, state, 3 * h_, inside);
  }

  AVX512 void backward_round(int64_t round, const Saved<E>& saved, const Operands<E>& operands,
                             const VectorSums& sums_z, const VectorSums& sums_y) {
    const int64_t steps = counts_.steps, first = round * steps;
    const float step = counts_.scales[counts_.rounds - counts_.grad_rounds + round];
    if (!saved.has_insides()) {
      bring(1, saved.y, round);
      add_y_part();
      bring(2, saved.z, first + steps);
    }
    back_through(true, step, saved, counts_.grad_steps() + round, operands.out_y, operands.hidden_y, round, sums_y);
    add_back(nets_.y, 0, h_, 2 * h_);
    std::fill_n(s_.round, rows_ * h_, 0.0f);
    for (int64_t k = first + steps - 1; k >= first; --k) {
      if (!saved.has_insides()) bring(2, saved.z, k);
      back_through(false, step, saved, k, operands.out_z, operands.hidden_z, k, sums_z);
      add_back(nets_.z, 2 * h_, 2 * h_, h_);
    }
    round_sums<E>(s_.round, rows_, h_, s_.total, s_.d_in, operands.round.panels, operands.round.unit(round, first_));
    add_back(nets_.z, h_, h_, h_);
  }

  // From the gradient of a new state to that of what goes into the gelu, in d_in.
  void back_through(bool is_y, float step, const Saved<E>& saved, int64_t update, const Slots<E>& out,
                    const Slots<E>& hidden, int64_t slot, const VectorSums& sums) {
    const Net& net = is_y ? nets_.y : nets_.z;
    Inside<E> inside = saved.inside(counts_, update, first_);
    if (!saved.has_insides()) {
      inside.slope = s_.slope, inside.normed = s_.normed, inside.scales = s_.scales;
      run(is_y, step, nullptr, &inside);
    }
    norm_rows_backward<E>(s_.d + (is_y ? h_ : 2 * h_), 3 * h_, rows_, h_, net, step, inside, s_.d_out, out.panels,
                          out.unit(slot, first_), sums);
    const BackThroughGelu<E> gelu{
        inside.slope, s_.d_in, h_, hidden.panels, hidden.unit(slot, first_), is_y ? nullptr : s_.round, sums.in_bias};
    rows_product<E>(left_of<E>(s_.d_out, h_), rows_, net.out_back, 0, h_, 0, h_, gelu);
  }

  // Adds d_in times `width` columns of the first weight, from `from` on, to d from column `to` on.
  void add_back(const Net& net, int64_t from, int64_t to, int64_t width) {
    float* d = s_.d + to - from;
    rows_product<E>(left_of<E>(s_.d_in, h_), rows_, net.in_back, 0, h_, from, from + width,
                    AddTo{d, 3 * h_, d, 3 * h_});
  }

  AVX512 void widen(const Stored* from, float* to) const {
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t i = 0; i < h_; i += kLanes) _mm512_storeu_ps(to + r * 3 * h_ + i, E::load(from + r * h_ + i));
    }
  }

  AVX512 void narrow(const float* from, Stored* to) const {
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t i = 0; i < h_; i += kLanes) E::store(to + r * h_ + i, _mm512_loadu_ps(from + r * 3 * h_ + i));
    }
  }

  const Counts& counts_;
  const NetPair& nets_;
  const Scratch<E> s_;
  const int64_t h_, first_, count_;
  int64_t rows_;
};

}  // namespace vector_latent_update
