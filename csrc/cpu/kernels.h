// The CPU kernels, one table of them per instruction set. No torch here.
#pragma once

#include "../kernels.h"
#include "parallel.h"

namespace unigen::cpu {

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
