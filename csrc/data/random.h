// The meaning is in trm_fast/data/_reference/random.py.
#pragma once

#include <cstdint>
#include <utility>

namespace trm_data {

class Random {
 public:
  Random(uint64_t seed, uint64_t index, uint64_t attempt) : state_(mix(mix(mix(seed) + index) + attempt)) {}

  // In [0, n).
  int below(int n) {
    return static_cast<int>((static_cast<unsigned __int128>(next()) * static_cast<uint64_t>(n)) >> 64);
  }

  // In [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  template <class Item>
  void shuffle(Item* items, int count) {
    for (int last = count - 1; last > 0; --last) std::swap(items[last], items[below(last + 1)]);
  }

 private:
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15); }

  uint64_t state_;
};

}  // namespace trm_data
