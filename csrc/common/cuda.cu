#include <torch/csrc/stable/library.h>

#include <string>

#include "common/revision.h"

namespace {
int64_t cuda_revision() { return trm_fast::kRevision; }

#define TEXT_OF(words) #words
#define TEXT(macro) TEXT_OF(macro)

// Set by setup.py, such as 8.0_9.0_10.0+PTX; the compiler's own list does not tell PTX.
std::string cuda_architectures() { return TEXT(TRM_FAST_CUDA_ARCHITECTURES); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("_cuda_revision", TORCH_BOX(&cuda_revision));
  m.impl("_cuda_architectures", TORCH_BOX(&cuda_architectures));
}
