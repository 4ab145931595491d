// Hands out parts of one block of memory; with no block it only counts.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace panel {

// Memory that is new to the process is mapped page by page as it is written; with pages of 2 MB that is cheap. Those
// that lie within the block are asked for.
inline void use_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = (begin + bytes) / kPage * kPage;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

class Arena {
 public:
  explicit Arena(void* memory = nullptr) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return place;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t memory_;
  int64_t bytes_ = 0;
};

}  // namespace panel
