// The CUDA kernels. No torch here.
#pragma once

#include "../kernels.h"

namespace unigen::cuda {

struct Launch {
  void* stream;     // cudaStream_t
  void* workspace;  // kWorkspaceBytes on the device, uninitialised, aligned to 256 bytes
  int multiprocessors;
};

constexpr int64_t kWorkspaceBytes = 1 << 17;

// Each enqueues its work on the stream, without synchronising or allocating; returns null, or an error's text.
#define UNIGEN_DECLARE(function, Arguments) const char* function(const Arguments&, const Launch&);
UNIGEN_KERNELS(UNIGEN_DECLARE)
#undef UNIGEN_DECLARE

}  // namespace unigen::cuda
