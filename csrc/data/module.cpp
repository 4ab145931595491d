// The module trm_fast._data: generators and solvers of puzzles, free of torch. The meaning is on the pages of
// trm_fast/data, which also check the arguments; the same functions in Python are in trm_fast/data/_reference.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "data/listops.h"
#include "data/maze.h"
#include "data/parallel.h"
#include "data/random.h"
#include "data/sudoku.h"

namespace py = pybind11;

namespace {
using namespace trm_data;

// Raised, together with REVISION in trm_fast/data/_native.py, whenever a function or a result changes.
constexpr int kRevision = 1;

constexpr int kMostThreads = 1024;

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Numbers = py::array_t<int64_t, py::array::c_style>;

Bytes bytes(py::ssize_t rows, py::ssize_t columns) { return Bytes({rows, columns}); }

// Python checks what users give; what is called past it must not read or write outside of an array.
void require(bool holds, const char* required) {
  if (!holds) throw std::invalid_argument(std::string("_data: ") + required);
}

sudoku::Board board_of(int box_rows, int box_columns, const Stop& stop) {
  const int64_t size = int64_t{box_rows} * box_columns;
  require(box_rows > 0 && box_columns > 0 && size <= sudoku::kMaxSize, "a box must have 1 to 9 cells");
  return sudoku::Board(box_rows, box_columns, stop);
}

int64_t maze_cells(int height, int width) {
  const int64_t cells = int64_t{height} * width;
  require(height >= 3 && width >= 3 && cells <= 1 << 30, "height and width must be >= 3, and cells at most 2^30");
  return cells;
}

void require_rows(const Bytes& tokens, int64_t columns) {
  require(tokens.ndim() == 2 && tokens.shape(1) == columns, "an array must have one row of cells for each item");
}

// Which items to make, from which attempt on.
struct Items {
  uint64_t seed;
  Numbers indices;
  int64_t first, tries;
  int threads;
};

// Calls work(i) for i in [0, count) without the lock of Python. An interrupt ends it, and is raised.
template <class Work>
void share_out(int64_t count, int threads, Stop& stop, const Work& work) {
  require(threads >= 1 && threads <= kMostThreads, "threads must be 1 to 1024");
  {
    const py::gil_scoped_release release;
    parallel(count, threads, stop, work, [] {
      const py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    });
  }
  if (stop) throw py::error_already_set();
}

// Calls make(random, i) for the attempts of each item; returns the attempt that was accepted, or -1.
template <class Make>
Numbers attempt(const Items& items, Stop& stop, const Make& make) {
  const int64_t count = items.indices.size();
  Numbers accepted(count);
  const int64_t* index = items.indices.data();
  int64_t* out = accepted.mutable_data();
  share_out(count, items.threads, stop, [&](int64_t i) {
    out[i] = -1;
    for (int64_t a = items.first; a < items.first + items.tries && out[i] < 0 && !stop; ++a) {
      if (make(Random(items.seed, index[i], a), i)) out[i] = a;
    }
  });
  return accepted;
}

std::tuple<Bytes, Bytes, Numbers> generate_sudoku(const Items& items, int box_rows, int box_columns, int fewest_clues,
                                                  int most_clues, bool unique, int least_depth, int most_depth) {
  Stop stop{false};
  const sudoku::Board board = board_of(box_rows, box_columns, stop);
  require(0 <= fewest_clues && fewest_clues <= most_clues && most_clues <= board.cells(), "clues must fit the board");
  const sudoku::Wanted wanted{fewest_clues, most_clues, unique, least_depth, most_depth};
  Bytes puzzles = bytes(items.indices.size(), board.cells()), solutions = bytes(items.indices.size(), board.cells());
  uint8_t *puzzle = puzzles.mutable_data(), *solution = solutions.mutable_data();
  const Numbers accepted = attempt(items, stop, [&](const Random& random, int64_t i) {
    const int64_t offset = i * board.cells();
    return sudoku::generate(board, wanted, random, puzzle + offset, solution + offset);
  });
  return {puzzles, solutions, accepted};
}

std::tuple<Bytes, Numbers, Numbers, Numbers> solve_sudoku(const Bytes& puzzles, int box_rows, int box_columns,
                                                          int threads) {
  Stop stop{false};
  const sudoku::Board board = board_of(box_rows, box_columns, stop);
  require_rows(puzzles, board.cells());
  const int64_t count = puzzles.shape(0), cells = board.cells();
  const bool known =
      std::all_of(puzzles.data(), puzzles.data() + count * cells, [&](uint8_t digit) { return digit <= board.size(); });
  require(known, "digits must be 0 to the size of the board");
  Bytes solutions = bytes(count, cells);
  Numbers numbers(count), depths(count), guesses(count);
  const uint8_t* puzzle = puzzles.data();
  uint8_t* solution = solutions.mutable_data();
  int64_t *number = numbers.mutable_data(), *depth = depths.mutable_data(), *guess = guesses.mutable_data();
  share_out(count, threads, stop, [&](int64_t i) {
    sudoku::Found found;
    board.search(board.start(puzzle + i * cells), 2, 0, found);
    std::memcpy(solution + i * cells, found.first, cells);
    number[i] = found.solutions;
    depth[i] = found.depth;
    guess[i] = found.guesses;
  });
  return {solutions, numbers, depths, guesses};
}

std::tuple<Bytes, Bytes, Numbers> generate_mazes(const Items& items, int height, int width, int openings,
                                                 int min_path) {
  Stop stop{false};
  const maze::Wanted wanted{height, width, openings, min_path};
  const int64_t cells = maze_cells(height, width);
  require(openings >= 0 && min_path >= 1, "openings must be >= 0 and min_path >= 1");
  Bytes inputs = bytes(items.indices.size(), cells), labels = bytes(items.indices.size(), cells);
  uint8_t *input = inputs.mutable_data(), *label = labels.mutable_data();
  const Numbers accepted = attempt(items, stop, [&](const Random& random, int64_t i) {
    return maze::generate(wanted, random, stop, input + i * cells, label + i * cells);
  });
  return {inputs, labels, accepted};
}

std::tuple<Bytes, Numbers, Numbers> solve_mazes(const Bytes& inputs, int height, int width, int threads) {
  const int64_t cells = maze_cells(height, width);
  require_rows(inputs, cells);
  const int64_t count = inputs.shape(0);
  Bytes labels = bytes(count, cells);
  Numbers lengths(count), ways(count);
  const uint8_t* input = inputs.data();
  uint8_t* label = labels.mutable_data();
  int64_t *length = lengths.mutable_data(), *way = ways.mutable_data();
  Stop stop{false};
  share_out(count, threads, stop, [&](int64_t i) {
    maze::Maze maze(height, width, stop);
    maze.read(input + i * cells);
    std::memcpy(label + i * cells, input + i * cells, cells);
    maze.write_path(label + i * cells);
    length[i] = maze.length();
    way[i] = maze.ways();
  });
  return {labels, lengths, ways};
}

std::tuple<Bytes, Numbers> generate_listops(const Items& items, int min_length, int max_length, int max_depth,
                                            int max_args, double nesting) {
  require(max_length >= 1 && max_depth >= 1 && max_args >= 2 && max_args <= 1 << 20 && max_length <= 1 << 30,
          "lengths and depth must be >= 1, and max_args 2 to 2^20");
  Stop stop{false};
  const listops::Wanted wanted{min_length, max_length, max_depth, max_args, nesting};
  Bytes tokens = bytes(items.indices.size(), max_length);
  uint8_t* token = tokens.mutable_data();
  const Numbers accepted = attempt(items, stop, [&](const Random& random, int64_t i) {
    return listops::generate(wanted, random, token + i * max_length);
  });
  return {tokens, accepted};
}

Numbers evaluate_listops(const Bytes& tokens, int threads) {
  require(tokens.ndim() == 2, "tokens must be rows");
  const int64_t count = tokens.shape(0), length = tokens.shape(1);
  Numbers values(count);
  const uint8_t* token = tokens.data();
  int64_t* value = values.mutable_data();
  Stop stop{false};
  share_out(count, threads, stop, [&](int64_t i) { value[i] = listops::evaluate(token + i * length, length); });
  return values;
}

}  // namespace

PYBIND11_MODULE(_data, m) {
  m.attr("REVISION") = kRevision;
  py::class_<Items>(m, "Items")
      .def(py::init([](uint64_t seed, Numbers indices, int64_t first, int64_t tries, int threads) {
             require(indices.ndim() == 1, "indices must have one dimension");
             require(first >= 0 && tries >= 0 && first <= INT64_MAX - tries, "attempts must be >= 0");
             return Items{seed, std::move(indices), first, tries, threads};
           }),
           py::arg("seed"), py::arg("indices").noconvert(), py::arg("first"), py::arg("tries"), py::arg("threads"));
  m.def("generate_sudoku", &generate_sudoku);
  m.def("solve_sudoku", &solve_sudoku, py::arg("puzzles").noconvert(), py::arg("box_rows"), py::arg("box_columns"),
        py::arg("threads"));
  m.def("generate_mazes", &generate_mazes);
  m.def("solve_mazes", &solve_mazes, py::arg("inputs").noconvert(), py::arg("height"), py::arg("width"),
        py::arg("threads"));
  m.def("generate_listops", &generate_listops);
  m.def("evaluate_listops", &evaluate_listops, py::arg("tokens").noconvert(), py::arg("threads"));
}
