// The CUDA kernels of one family (-DUNIT="…"), and in the first of them the C functions the test calls.
#include UNIT

#ifdef UNIGEN_EMULATION_ENTRIES
#include <cstring>

#include "cuda/kernels.h"

namespace {

const unigen::cuda::Launch launch_with(int multiprocessors) {
  alignas(256) static char workspace[unigen::cuda::kWorkspaceBytes];
  std::memset(workspace, 0xFF, sizeof workspace);  // NaN to whoever reads what was not written
  return {nullptr, workspace, multiprocessors};
}

}  // namespace

#define UNIGEN_ENTRY(function, Arguments)                                                               \
  extern "C" const char* function(const unigen::Arguments* arguments, int multiprocessors) {            \
    return unigen::cuda::function(*arguments, launch_with(multiprocessors));                            \
  }                                                                                                     \
  extern "C" int64_t sizeof_##function() { return int64_t(sizeof(unigen::Arguments)); }
UNIGEN_KERNELS(UNIGEN_ENTRY)
extern "C" int64_t max_dims() { return unigen::kMaxDims; }
extern "C" void set_compute_capability(int major) { compute_capability = major; }
#endif
