// Shares iterations out to the threads of torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace trm_fast {

#ifdef __SANITIZE_THREAD__
inline char fork_token, join_token;

// ThreadSanitizer does not see how the threads of torch wait for each other, so it is told. Each iteration goes out on
// its own, so that small calls have threads too.
template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
  const auto told = [&](int64_t first, int64_t last) {
    __tsan_acquire(&fork_token);
    work(first, last);
    __tsan_release(&join_token);
  };
  __tsan_release(&fork_token);
  torch::stable::parallel_for(begin, end, 1, told);
  __tsan_acquire(&join_token);
}
#else
using torch::stable::parallel_for;
#endif

}  // namespace trm_fast
