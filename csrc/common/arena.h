// Hands out parts of one block of memory; with no block it only counts.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
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

// AddressSanitizer sees one block, so behind each part it gets bytes that nobody may touch.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGap = 64;
#else
constexpr int64_t kGap = 0;
#endif

class Arena {
 public:
  // `gap` is 0 where parts lie as others expect them.
  explicit Arena(void* memory = nullptr, int64_t gap = kGap)
      : memory_(reinterpret_cast<uintptr_t>(memory)), gap_(gap) {}

  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(memory_ + bytes_);
    const int64_t used = count * static_cast<int64_t>(sizeof(T)), taken = (used + 63) / 64 * 64 + gap_;
#ifdef __SANITIZE_ADDRESS__
    if (memory_ != 0 && gap_ > 0) ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(place) + used, taken - used);
#endif
    bytes_ += taken;
    return place;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t memory_;
  int64_t gap_;
  int64_t bytes_ = 0;
};

}  // namespace panel
