// The library of CPU kernels, those of the instruction set found at load.

#include <strings.h>

#include <cstdlib>

#include "../bindings/library.h"
#include "kernels.h"

namespace unigen::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// The best set the machine has, or the one that UNIGEN_FAST_ISA names if the machine has it.
InstructionSet choose() {
  const char* wanted = std::getenv("UNIGEN_FAST_ISA");
  const auto wants = [&](const char* name) { return !wanted || !*wanted || strcasecmp(wanted, name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wants("avx512")) return {"AVX512", &kernels_avx512()};
  if (avx2 && (wants("avx2") || wants("avx512"))) return {"AVX2", &kernels_avx2()};
#endif
  return {"default", &kernels_default()};
}

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  UNIGEN_CALL(torch_parallel_for, begin, end, grain, task, context);
}

const ChosenKernels chosen = {
#define UNIGEN_MEMBER(function, Arguments) \
  [](const Arguments& arguments) { instruction_set().kernels->function(arguments, {parallel_for}); },
    UNIGEN_KERNELS(UNIGEN_MEMBER)
#undef UNIGEN_MEMBER
};

struct Backend {
#define UNIGEN_RUN(function, Arguments)                             \
  static void function(const Arguments& arguments, const Tensor&) { \
    chosen.function(arguments);                                     \
    Copies::of_this_thread().finish();                              \
  }
  UNIGEN_KERNELS(UNIGEN_RUN)
#undef UNIGEN_RUN
};

}  // namespace
}  // namespace unigen::cpu

UNIGEN_LIBRARY(CPU, unigen::cpu::Backend)

UNIGEN_EXPORT const char* unigen_build_info() {
  static const std::string text = std::string("C++, ") + unigen::cpu::instruction_set().name;
  return text.c_str();
}

// for `_autograd`
UNIGEN_EXPORT const void* unigen_kernels() { return &unigen::cpu::chosen; }
