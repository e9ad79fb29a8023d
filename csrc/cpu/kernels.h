// The CPU kernels, one table of them per instruction set. No torch here.
#pragma once

#include "../kernels.h"

namespace unigen::cpu {

// at::parallel_for behind a pointer: runs task(context, begin, end) over pieces of [begin, end)
struct Parallel {
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context);
};

struct Kernels {
#define UNIGEN_MEMBER(function, Arguments) void (*function)(const Arguments&, const Parallel&);
  UNIGEN_KERNELS(UNIGEN_MEMBER)
#undef UNIGEN_MEMBER
};

// The kernels of the instruction set chosen at load, on PyTorch's threads
struct ChosenKernels {
#define UNIGEN_MEMBER(function, Arguments) void (*function)(const Arguments&);
  UNIGEN_KERNELS(UNIGEN_MEMBER)
#undef UNIGEN_MEMBER
};

// csrc/cpu/*.cpp are compiled once for each of these; the caller asks the CPU before it uses one
const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace unigen::cpu
