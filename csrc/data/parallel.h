// Shares items out to threads. What becomes of an item never depends on who works on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <future>
#include <system_error>
#include <vector>

namespace trm_data {

// Set when the results are no longer wanted; work that takes long looks at it.
using Stop = std::atomic<bool>;

// A person who interrupts should not notice it; a look at the signals of the process costs microseconds.
constexpr std::chrono::milliseconds kLook{50};

// Calls work(i) for i in [0, count) in `threads` threads, or as many as the system gives, while the calling one asks
// is_interrupted(); when that says so, `stop` is set and the rest left. An exception ends up in the caller.
template <class Work, class IsInterrupted>
void parallel(int64_t count, int threads, Stop& stop, const Work& work, const IsInterrupted& is_interrupted) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i; !stop && (i = next.fetch_add(1)) < count;) work(i);
  };
  std::vector<std::future<void>> workers;
  for (int64_t t = 0; t < std::min<int64_t>(threads, count); ++t) {
    try {
      workers.push_back(std::async(std::launch::async, run));
    } catch (const std::system_error&) {
      if (workers.empty()) throw;
      break;
    }
  }
  for (auto& worker : workers) {
    while (worker.wait_for(kLook) != std::future_status::ready) {
      if (!stop && is_interrupted()) stop = true;
    }
  }
  for (auto& worker : workers) worker.get();
}

}  // namespace trm_data
