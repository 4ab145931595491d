// The meaning is in trm_fast/data/puzzles/maze.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "data/parallel.h"
#include "data/random.h"

namespace trm_data::maze {

enum Token : uint8_t { kPad, kWall, kFree, kStart, kGoal, kPath };

struct Wanted {
  int height, width;
  int openings;
  int min_path;
};

class Maze {
 public:
  // Walks over all cells end, with whatever they have found, as soon as `stop` is set.
  Maze(int height, int width, const Stop& stop)
      : height_(height), width_(width), stop_(stop), free_(height * width, 0) {}

  // A tree of corridors: a cell is opened if it touches one open cell.
  void carve(Random& random) {
    const int row = 1 + random.below(height_ - 2);
    std::vector<int> stack{row * width_ + 1 + random.below(width_ - 2)};
    free_[stack[0]] = 1;
    while (!stack.empty() && !stop_) {
      int options[4], count = 0;
      for (int direction = 0; direction < 4; ++direction) {
        const int cell = stack.back() + step(direction);
        if (is_inside(cell) && !free_[cell] && open_around(cell) == 1) options[count++] = cell;
      }
      if (count == 0) {
        stack.pop_back();
        continue;
      }
      stack.push_back(options[random.below(count)]);
      free_[stack.back()] = 1;
    }
  }

  // Opens walls between open cells; false if there are too few.
  bool open_walls(int openings, Random& random) {
    if (openings == 0) return true;
    std::vector<int> walls;
    for (int cell = 0; cell < cells(); ++cell) {
      if (is_inside(cell) && !free_[cell] && open_around(cell) >= 2) walls.push_back(cell);
    }
    if (static_cast<int>(walls.size()) < openings) return false;
    random.shuffle(walls.data(), static_cast<int>(walls.size()));
    for (int i = 0; i < openings; ++i) free_[walls[i]] = 1;
    return true;
  }

  // Draws start and goal; false if no goal is far enough with one shortest path.
  bool draw_ends(int min_path, Random& random) {
    std::vector<int> options;
    for (int cell = 0; cell < cells(); ++cell) {
      if (free_[cell]) options.push_back(cell);
    }
    start_ = options[random.below(static_cast<int>(options.size()))];
    measure();
    options.clear();
    for (int cell = 0; cell < cells(); ++cell) {
      if (distance_[cell] >= min_path && ways_[cell] == 1) options.push_back(cell);
    }
    if (options.empty()) return false;
    goal_ = options[random.below(static_cast<int>(options.size()))];
    return true;
  }

  void read(const uint8_t* tokens) {
    for (int cell = 0; cell < cells(); ++cell) {
      free_[cell] = tokens[cell] >= kFree;
      if (tokens[cell] == kStart) start_ = cell;
      if (tokens[cell] == kGoal) goal_ = cell;
    }
    measure();
  }

  void write(uint8_t* inputs) const {
    for (int cell = 0; cell < cells(); ++cell) inputs[cell] = free_[cell] ? kFree : kWall;
    inputs[start_] = kStart;
    inputs[goal_] = kGoal;
  }

  // Marks the shortest path; among several the one that, seen from the goal, turns up, left, right, down in this order.
  void write_path(uint8_t* labels) const {
    if (distance_[goal_] < 0) return;
    for (int cell = goal_; distance_[cell] > 1;) {
      const int before = distance_[cell] - 1;
      int direction = 0;
      while (!is_open(cell, direction) || distance_[cell + step(direction)] != before) ++direction;
      cell += step(direction);
      labels[cell] = kPath;
    }
  }

  int length() const { return distance_[goal_]; }
  int ways() const { return ways_[goal_]; }

 private:
  int cells() const { return height_ * width_; }

  int step(int direction) const {
    const int steps[] = {-width_, -1, 1, width_};
    return steps[direction];
  }

  bool is_inside(int cell) const {
    const int row = cell / width_, column = cell % width_;
    return row > 0 && row < height_ - 1 && column > 0 && column < width_ - 1;
  }

  // For cells that are inside.
  int open_around(int cell) const {
    return free_[cell - width_] + free_[cell - 1] + free_[cell + 1] + free_[cell + width_];
  }

  // Mazes that come from elsewhere may be open at the border.
  bool is_open(int cell, int direction) const {
    const int column = cell % width_;
    if ((direction == 1 && column == 0) || (direction == 2 && column == width_ - 1)) return false;
    const int next = cell + step(direction);
    return next >= 0 && next < cells() && free_[next];
  }

  // Breadth-first search: the distance from the start (-1: none) and the number of shortest paths (2: more).
  void measure() {
    distance_.assign(cells(), -1);
    ways_.assign(cells(), 0);
    distance_[start_] = 0;
    ways_[start_] = 1;
    std::vector<int> queue{start_};
    for (size_t i = 0; i < queue.size() && !stop_; ++i) {
      const int cell = queue[i];
      for (int direction = 0; direction < 4; ++direction) {
        if (!is_open(cell, direction)) continue;
        const int next = cell + step(direction);
        if (distance_[next] < 0) {
          distance_[next] = distance_[cell] + 1;
          queue.push_back(next);
        }
        if (distance_[next] == distance_[cell] + 1) ways_[next] = std::min(2, ways_[next] + ways_[cell]);
      }
    }
  }

  int height_, width_;
  const Stop& stop_;
  int start_ = 0, goal_ = 0;
  std::vector<uint8_t> free_;
  std::vector<int> distance_, ways_;
};

// Makes one attempt; false where it is not what is wanted.
inline bool generate(const Wanted& wanted, Random random, const Stop& stop, uint8_t* inputs, uint8_t* labels) {
  Maze maze(wanted.height, wanted.width, stop);
  maze.carve(random);
  if (stop || !maze.open_walls(wanted.openings, random) || !maze.draw_ends(wanted.min_path, random)) return false;
  maze.write(inputs);
  maze.write(labels);
  maze.write_path(labels);
  return true;
}

}  // namespace trm_data::maze
