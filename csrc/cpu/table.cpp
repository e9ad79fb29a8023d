// The table of this instruction set's kernels.
#include "kernels.h"
#include "vec.h"

namespace unigen::cpu {
namespace UNIGEN_ISA_NAMESPACE {

#define UNIGEN_DECLARE(function, Arguments) void function(const Arguments&, const Parallel&);
UNIGEN_KERNELS(UNIGEN_DECLARE)
#undef UNIGEN_DECLARE

}  // namespace UNIGEN_ISA_NAMESPACE

const Kernels& UNIGEN_JOIN(kernels_, UNIGEN_ISA)() {
  static constexpr Kernels kernels = {
#define UNIGEN_ENTRY(function, Arguments) &UNIGEN_ISA_NAMESPACE::function,
      UNIGEN_KERNELS(UNIGEN_ENTRY)
#undef UNIGEN_ENTRY
  };
  return kernels;
}

}  // namespace unigen::cpu
