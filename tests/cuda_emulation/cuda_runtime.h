// Runs CUDA kernels on a CPU, so that their indices, barriers and reductions are tested without a GPU.
//
// Stands in for the toolkit's header of this name. Blocks run one after the other, the threads of a block as fibers
// that are switched at barriers and shuffles only, in an order that changes from block to block: a missing barrier
// shows as a wrong result, a barrier that some thread never reaches as an abort. The blocks of a cluster are switched
// at its barriers, behind which their shared memory, of which there is but one, is lost. Speed, caches and asynchrony
// are not imitated.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class State { runnable, at_barrier, at_shuffle, at_cluster, done };

// Lives as long as the process: between blocks it waits in State::done.
struct Fiber {
  State state = State::done;
  bool started = false;
  ucontext_t context;  // of its first switch; the later ones are jumps, which make no system call
  jmp_buf resume;
  std::vector<char> stack;
  double exchange[2];  // of two shuffles in turn: a lane may be one ahead
  unsigned shuffles = 0;
};

inline std::vector<Fiber> fibers(2048);  // of the blocks of a cluster, one after the other
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void wait(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {
    body();
    wait(State::done);
  }
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread % blockDim.x, 0, 0);
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  fiber.stack.resize(kStackBytes);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

inline bool all(unsigned begin, unsigned end, State state) {
  for (unsigned t = begin; t < end; ++t)
    if (fibers[t].state != state) return false;
  return true;
}

inline bool release(unsigned begin, unsigned end, State state) {
  if (!all(begin, end, state)) return false;
  for (unsigned t = begin; t < end; ++t) fibers[t].state = State::runnable;
  return true;
}

// as far as a barrier of the cluster
inline void run_block(unsigned begin, unsigned end, bool reversed) {
  for (bool released = true; released;) {
    for (unsigned i = 0; i < end - begin; ++i) {
      const unsigned thread = reversed ? end - 1 - i : begin + i;
      if (fibers[thread].state == State::runnable) resume(thread);
    }
    released = release(begin, end, State::at_barrier);
    for (unsigned t = begin; t < end; t += kWarp) released = release(t, t + kWarp, State::at_shuffle) || released;
  }
}

inline void run_cluster(unsigned x, unsigned y, unsigned blocks) {
  const unsigned threads = blockDim.x, end = blocks * threads;
  for (unsigned t = 0; t < end; ++t) fibers[t].state = State::runnable;
  do {
    for (unsigned block = 0; block < blocks; ++block) {
      blockIdx = dim3(x + block, y, 0);
      run_block(block * threads, (block + 1) * threads, (x + block + y) % 2 == 1);
    }
  } while (release(0, end, State::at_cluster));
  if (!all(0, end, State::done)) {
    std::fprintf(stderr, "emulation: a barrier or shuffle that not every thread reaches\n");
    std::abort();
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::at_barrier); }
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait() { emulation::wait(emulation::State::at_cluster); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  const unsigned thread = emulation::current;
  const unsigned turn = emulation::fibers[thread].shuffles++ % 2;
  std::memcpy(&emulation::fibers[thread].exchange[turn], &value, sizeof value);
  emulation::wait(emulation::State::at_shuffle);
  std::memcpy(&value, &emulation::fibers[thread ^ unsigned(lane_mask)].exchange[turn], sizeof value);
  return value;
}

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(M_PI * double(x)));
  *cosine = float(std::cos(M_PI * double(x)));
}
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

inline int compute_capability = 9;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = compute_capability;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Given&... given) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const bool sizes = gridDim.x >= 1 && gridDim.x <= 0x7FFFFFFF && gridDim.y >= 1 && gridDim.y <= 65535;
  const unsigned blocks = config->numAttrs ? config->attrs->val.clusterDim.x : 1;  // of a cluster
  const bool clusters = blocks == 1 || (blocks <= 8 && gridDim.x % blocks == 0 && compute_capability >= 9);
  if (!sizes || !clusters || (0 + ... + sizeof(Given)) > 4096) return cudaErrorInvalidConfiguration;
  emulation::body = [&] { kernel(given...); };
  for (unsigned y = 0; y < gridDim.y; ++y) {
    for (unsigned x = 0; x < gridDim.x; x += blocks) emulation::run_cluster(x, y, blocks);
  }
  return cudaSuccess;
}
