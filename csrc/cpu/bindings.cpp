// The module `unigen_fast._cpu`: importing it registers the CPU kernels of the instruction set found at load.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "../bindings/ops.h"
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
  const string name = wanted ? wanted : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name.empty() || name == "avx512")) return {"AVX512", &kernels_avx512()};
  if (avx2 && (name.empty() || name == "avx2" || name == "avx512")) return {"AVX2", &kernels_avx2()};
#endif
  return {"default", &kernels_default()};
}

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { task(context, b, e); });
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

STABLE_TORCH_LIBRARY_IMPL(unigen_fast, CPU, m) {
#define UNIGEN_REGISTER(op) m.impl(#op, TORCH_BOX(&unigen::op<Backend>));
  UNIGEN_OPS(UNIGEN_REGISTER)
#undef UNIGEN_REGISTER
}

}  // namespace unigen::cpu

PYBIND11_MODULE(_cpu, m) {
  m.def("build_info", [] { return std::string("C++, ") + unigen::cpu::instruction_set().name; });
  m.def("instruction_set", [] { return std::string(unigen::cpu::instruction_set().name); });
  m.def("kernels", [] { return pybind11::capsule(&unigen::cpu::chosen); });
  m.def("ops", [] {
    return std::vector<std::string>{
#define UNIGEN_NAME(op) #op,
        UNIGEN_OPS(UNIGEN_NAME)
#undef UNIGEN_NAME
    };
  });
}
