#include <torch/csrc/stable/library.h>

#include "common/revision.h"

namespace {
int64_t cpu_revision() { return trm_fast::kRevision; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) { m.impl("_cpu_revision", TORCH_BOX(&cpu_revision)); }
