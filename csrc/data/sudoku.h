// The meaning is in trm_fast/data/puzzles/sudoku.py.
//
// A state of the search is one set of cells for each digit: where the digit can still stand. So a rule looks at all
// cells, or at one row, column or box, with a few operations on words of 128 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "data/parallel.h"
#include "data/random.h"

namespace trm_data::sudoku {

constexpr int kMaxSize = 9;
constexpr int kMaxCells = kMaxSize * kMaxSize;

using Cells = unsigned __int128;  // bit c is cell c in reading order

inline Cells bit_of(int cell) { return static_cast<Cells>(1) << cell; }
inline bool is_single(Cells cells) { return cells != 0 && (cells & (cells - 1)) == 0; }
inline int first_of(Cells cells) {
  const auto low = static_cast<uint64_t>(cells);
  return low ? __builtin_ctzll(low) : 64 + __builtin_ctzll(static_cast<uint64_t>(cells >> 64));
}

struct State {
  Cells places[kMaxSize];  // of each digit
  Cells open;              // cells without a digit
};

// What a search has found.
struct Found {
  int solutions = 0;
  int depth = 0;
  int64_t guesses = 0;
  uint8_t first[kMaxCells] = {};
};

class Board {
 public:
  // Searches end, with whatever they have found, as soon as `stop` is set.
  Board(int box_rows, int box_columns, const Stop& stop)
      : size_(box_rows * box_columns), cells_(size_ * size_), stop_(stop) {
    for (int cell = 0; cell < cells_; ++cell) {
      const int row = cell / size_, column = cell % size_;
      const int box = row / box_rows * box_rows + column / box_columns;
      const int units[] = {row, size_ + column, 2 * size_ + box};
      for (int unit : units) units_[unit] |= bit_of(cell);
      all_ |= bit_of(cell);
    }
    for (int cell = 0; cell < cells_; ++cell) {
      for (int unit = 0; unit < 3 * size_; ++unit) {
        if (units_[unit] & bit_of(cell)) peers_[cell] |= units_[unit];
      }
      peers_[cell] &= ~bit_of(cell);
    }
  }

  int size() const { return size_; }
  int cells() const { return cells_; }

  // The state after the clues have ruled their digit out in the cells that see them.
  State start(const uint8_t* puzzle) const {
    Cells seen[kMaxSize] = {}, clues[kMaxSize] = {}, given = 0;
    for (int cell = 0; cell < cells_; ++cell) {
      if (puzzle[cell] == 0) continue;
      const int digit = puzzle[cell] - 1;
      seen[digit] |= peers_[cell];
      clues[digit] |= bit_of(cell);
      given |= bit_of(cell);
    }
    State state;
    state.open = all_ & ~given;
    for (int d = 0; d < size_; ++d) state.places[d] = (state.open | clues[d]) & ~seen[d];
    return state;
  }

  // Naked and hidden singles, until there are no more; false on a contradiction.
  bool propagate(State& state) const {
    for (;;) {
      Cells once = 0, twice = 0;
      for (int d = 0; d < size_; ++d) {
        twice |= once & state.places[d];
        once |= state.places[d];
      }
      if (once != all_) return false;
      const Cells naked = once & ~twice & state.open;
      if (naked) {
        place_naked(state, naked);
        continue;
      }
      bool found = false;
      if (!place_hidden(state, found)) return false;
      if (!found) return true;
    }
  }

  // Searches until `limit` solutions are found.
  void search(State state, int limit, int depth, Found& found) const {
    if (stop_ || !propagate(state)) return;
    if (state.open == 0) {
      if (found.solutions++ == 0) write(state, found.first);
      return;
    }
    const int cell = most_constrained(state);
    if (depth + 1 > found.depth) found.depth = depth + 1;
    for (int d = 0; d < size_ && found.solutions < limit; ++d) {
      if (!(state.places[d] & bit_of(cell))) continue;
      ++found.guesses;
      State child = state;
      place(child, cell, d);
      search(child, limit, depth + 1, found);
    }
  }

  // A random complete grid, from the state of an empty one.
  bool fill(State state, Random& random, uint8_t* grid) const {
    if (!propagate(state)) return false;
    if (state.open == 0) {
      write(state, grid);
      return true;
    }
    const int cell = most_constrained(state);
    int digits[kMaxSize], count = 0;
    for (int d = 0; d < size_; ++d) {
      if (state.places[d] & bit_of(cell)) digits[count++] = d;
    }
    random.shuffle(digits, count);
    for (int i = 0; i < count; ++i) {
      State child = state;
      place(child, cell, digits[i]);
      if (fill(child, random, grid)) return true;
    }
    return false;
  }

  // Whether the puzzle, which has the solution with `digit` in the empty `cell`, has one with another digit there.
  bool has_other(const uint8_t* puzzle, int cell, int digit) const {
    State state = start(puzzle);
    state.places[digit - 1] &= ~bit_of(cell);
    Found found;
    search(state, 1, 0, found);
    return found.solutions > 0;
  }

 private:
  void place(State& state, int cell, int digit) const {
    const Cells bit = bit_of(cell);
    for (int d = 0; d < size_; ++d) state.places[d] &= ~bit;
    state.places[digit] = (state.places[digit] & ~peers_[cell]) | bit;
    state.open &= ~bit;
  }

  // Of two equal digits that see each other the second loses its cell, which the next round notices.
  void place_naked(State& state, Cells naked) const {
    state.open &= ~naked;
    for (int d = 0; d < size_; ++d) {
      for (Cells left = state.places[d] & naked; left;) {
        const int cell = first_of(left);
        state.places[d] &= ~peers_[cell];
        left &= state.places[d] & ~bit_of(cell);
      }
    }
  }

  bool place_hidden(State& state, bool& found) const {
    for (int d = 0; d < size_; ++d) {
      for (int unit = 0; unit < 3 * size_; ++unit) {
        const Cells places = state.places[d] & units_[unit];
        if (places == 0) return false;
        if ((places & state.open) && is_single(places)) {
          place(state, first_of(places), d);
          found = true;
        }
      }
    }
    return true;
  }

  // The open cell with the fewest digits, the first of them in reading order.
  int most_constrained(const State& state) const {
    Cells with[kMaxSize + 1] = {};  // with[k]: cells with more than k digits
    for (int d = 0; d < size_; ++d) {
      for (int k = d; k > 0; --k) with[k] |= with[k - 1] & state.places[d];
      with[0] |= state.places[d];
    }
    for (int k = 1;; ++k) {
      const Cells fewest = with[k - 1] & ~with[k] & state.open;
      if (fewest) return first_of(fewest);
    }
  }

  void write(const State& state, uint8_t* grid) const {
    for (int d = 0; d < size_; ++d) {
      for (Cells left = state.places[d]; left; left &= left - 1) grid[first_of(left)] = static_cast<uint8_t>(d + 1);
    }
  }

  int size_, cells_;
  const Stop& stop_;
  Cells all_ = 0;
  Cells units_[3 * kMaxSize] = {};
  Cells peers_[kMaxCells] = {};
};

struct Wanted {
  int fewest_clues, most_clues;
  bool unique;
  int least_depth, most_depth;  // no matter if most_depth < 0
};

// Makes one attempt; false where it is not what is wanted.
inline bool generate(const Board& board, const Wanted& wanted, Random random, uint8_t* puzzle, uint8_t* solution) {
  const int target = wanted.fewest_clues + random.below(wanted.most_clues - wanted.fewest_clues + 1);
  std::memset(puzzle, 0, board.cells());
  board.fill(board.start(puzzle), random, solution);
  std::memcpy(puzzle, solution, board.cells());
  int order[kMaxCells];
  for (int i = 0; i < board.cells(); ++i) order[i] = i;
  random.shuffle(order, board.cells());
  int clues = board.cells();
  for (int i = 0; i < board.cells() && clues > target; ++i) {
    const int cell = order[i];
    puzzle[cell] = 0;
    --clues;
    if (wanted.unique && board.has_other(puzzle, cell, solution[cell])) {
      puzzle[cell] = solution[cell];
      ++clues;
    }
  }
  if (clues > wanted.most_clues) return false;
  if (wanted.most_depth < 0) return true;
  Found found;
  board.search(board.start(puzzle), 2, 0, found);
  return wanted.least_depth <= found.depth && found.depth <= wanted.most_depth;
}

}  // namespace trm_data::sudoku
