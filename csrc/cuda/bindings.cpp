// The module `unigen_fast._cuda`: importing it registers the native CUDA kernels.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>

#include "../bindings/ops.h"
#include "kernels.h"

// In libtorch_cuda's C interface; the header declares it only where torch was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace unigen::cuda {
namespace {

int multiprocessors(int32_t device) {
  static int counts[64] = {};
  if (device >= 64) return 108;  // a launch heuristic, not a limit
  if (counts[device] == 0) cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device);
  return counts[device];
}

// Runs on the device and the current stream of a tensor.
template <class Arguments>
void run(const char* (*kernel)(const Arguments&, const Launch&), const Arguments& arguments, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Launch launch;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &launch.stream));
  // freed while the kernel may still run: safe, PyTorch's allocator reuses memory in stream order
  const Tensor workspace = empty_contiguous(like, {kWorkspaceBytes}, ScalarType::Byte);
  launch.workspace = workspace.data_ptr();
  launch.multiprocessors = multiprocessors(device);
  const char* error = kernel(arguments, launch);
  STD_TORCH_CHECK(error == nullptr, "unigen_fast: CUDA launch failed: ", error);
  Copies::of_this_thread().finish();
}

struct Backend {
#define UNIGEN_RUN(function, Arguments)                                  \
  static void function(const Arguments& arguments, const Tensor& like) { \
    run(&unigen::cuda::function, arguments, like);                       \
  }
  UNIGEN_KERNELS(UNIGEN_RUN)
#undef UNIGEN_RUN
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(unigen_fast, CUDA, m) {
#define UNIGEN_REGISTER(op) m.impl(#op, TORCH_BOX(&unigen::op<Backend>));
  UNIGEN_OPS(UNIGEN_REGISTER)
#undef UNIGEN_REGISTER
}

}  // namespace unigen::cuda

PYBIND11_MODULE(_cuda, m) {
  m.def("build_info", [] {
    return "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
           ", sm_80 and sm_90";
  });
  m.def("ops", [] {
    return std::vector<std::string>{
#define UNIGEN_NAME(op) #op,
        UNIGEN_OPS(UNIGEN_NAME)
#undef UNIGEN_NAME
    };
  });
}
