// Storage dtypes in tables, as STORAGE on the pages of the ops.
#pragma once

#include <cstdint>

namespace trm_fast {
enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
}
