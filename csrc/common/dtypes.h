// Storage dtypes in tables, as STORAGE on the pages of the ops.
#pragma once

#include <cstdint>

namespace trm_fast {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Whether numbers of a table can be the address and the dtype, `last` or one before it, of an array that must be there
// if it is `needed`. That something lies there is taken on trust.
inline bool is_array(int64_t address, int64_t dtype, DType last, bool needed) {
  return kFloat32 <= dtype && dtype <= last && (address != 0 || !needed);
}

}  // namespace trm_fast
