// Raised, together with REVISION in trm_fast/_native.py, whenever a schema changes: the arguments of a native op are
// not checked against its schema, so a library of another revision must not be called.
#pragma once

#include <cstdint>

namespace trm_fast {
constexpr int64_t kRevision = 5;
}
