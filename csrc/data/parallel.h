// Shares items out to threads. What becomes of an item never depends on who works on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <future>
#include <vector>

namespace trm_data {

// Calls work(i) for i in [0, count); the calling thread is one of `threads`. An exception ends up in the caller.
template <class Work>
void parallel(int64_t count, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
  };
  std::vector<std::future<void>> others;
  for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) {
    others.push_back(std::async(std::launch::async, run));
  }
  run();
  for (auto& other : others) other.get();
}

}  // namespace trm_data
