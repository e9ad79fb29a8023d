// The threads of the CPU kernels.
#pragma once

#include <cstdint>

namespace unigen::cpu {

// at::parallel_for behind a pointer: runs task(begin, end, context) over pieces of [begin, end)
struct Parallel {
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context);
};

}  // namespace unigen::cpu
