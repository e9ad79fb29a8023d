// The library of native CUDA kernels.

#include <cuda_runtime_api.h>

#include "../bindings/library.h"
#include "kernels.h"

namespace unigen::cuda {
namespace {

int multiprocessors(int32_t device) {
  static int counts[64] = {};
  if (device >= 64) return 108;  // a launch heuristic, not a limit
  if (counts[device] == 0) cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device);
  return counts[device];
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) { UNIGEN_CALL(aoti_torch_create_device_guard, device, &handle_); }
  ~DeviceGuard() { aoti_torch_delete_device_guard(handle_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardOpaque* handle_;
};

// Runs on the device and the current stream of a tensor.
template <class Arguments>
void run(const char* (*kernel)(const Arguments&, const Launch&), const Arguments& arguments, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const DeviceGuard guard(device);
  Launch launch;
  UNIGEN_CALL(aoti_torch_get_current_cuda_stream, device, &launch.stream);
  // freed while the kernel may still run: safe, PyTorch's allocator reuses memory in stream order
  const Tensor workspace = empty_contiguous(like, {kWorkspaceBytes}, ScalarType::Byte);
  launch.workspace = workspace.data_ptr();
  launch.multiprocessors = multiprocessors(device);
  const char* error = kernel(arguments, launch);
  UNIGEN_CHECK(error == nullptr, "unigen_fast: CUDA launch failed: ", error);
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
}  // namespace unigen::cuda

UNIGEN_LIBRARY(CUDA, unigen::cuda::Backend)

#define UNIGEN_TEXT(x) #x
#define UNIGEN_EXPANDED(x) UNIGEN_TEXT(x)

UNIGEN_EXPORT const char* unigen_build_info() {
  static const std::string text = "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                                  std::to_string(CUDART_VERSION % 1000 / 10) + ", " UNIGEN_EXPANDED(UNIGEN_ARCHITECTURES);
  return text.c_str();
}
