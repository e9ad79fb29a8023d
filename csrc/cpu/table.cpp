// The table of this instruction set's kernels.
#include "rows.h"

namespace unigen::cpu {

const Kernels& UNIGEN_JOIN(kernels_, UNIGEN_ISA)() {
  static constexpr Kernels kernels = {
#define UNIGEN_ENTRY(function, Arguments) &UNIGEN_ISA_NAMESPACE::function,
      UNIGEN_KERNELS(UNIGEN_ENTRY)
#undef UNIGEN_ENTRY
  };
  return kernels;
}

}  // namespace unigen::cpu
