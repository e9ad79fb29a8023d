// What a launch of a CUDA kernel needs beside its arguments.
#pragma once

#include <cstdint>

namespace unigen::cuda {

struct Launch {
  void* stream;     // cudaStream_t
  void* workspace;  // kWorkspaceBytes on the device, uninitialised, aligned to 256 bytes
  int multiprocessors;
};

constexpr int64_t kWorkspaceBytes = 1 << 17;

}  // namespace unigen::cuda
