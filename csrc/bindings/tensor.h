// What the ops know of torch. The libraries of kernels see its stable C interface (stable.h); `_autograd`, which calls the
// ops past the dispatcher, sees ATen (UNIGEN_ATEN). A tensor has the same methods in both; the rest is here.
#pragma once

#ifdef UNIGEN_ATEN
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#else
#include "stable.h"
#endif

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace unigen {

#ifdef UNIGEN_ATEN
using at::ScalarType;
using Shape = at::IntArrayRef;
#define UNIGEN_CHECK(condition, ...) TORCH_CHECK(condition, __VA_ARGS__)
#endif

// Memory that is new to the process costs a page fault every 4 KiB: of a large tensor, more time than a kernel takes to fill
// it. This asks for pages of 2 MiB, where the system gives them to who asks; memory that has its pages keeps them.
template <class T>
T with_huge_pages(T tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uint64_t bytes = uint64_t(tensor.numel()) * tensor.element_size();
  if (tensor.is_cpu() && bytes >= 2u << 21) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()), first = begin & ~(page - 1);
    madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

#ifdef UNIGEN_ATEN

using at::Tensor;
using at::empty_like;

inline void copy_into(Tensor target, const Tensor& source) { target.copy_(source); }

// on the CPU, as all that is called directly
inline Tensor empty_strided(const Tensor&, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  return with_huge_pages(at::detail::empty_strided_cpu(at::IntArrayRef(sizes, ndim), at::IntArrayRef(strides, ndim), dtype));
}

#else

inline Tensor empty_strided(const Tensor& like, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorOpaque* handle;
  const Device device = like.device();
  UNIGEN_CALL(aoti_torch_empty_strided, ndim, sizes, strides, dtype_codes()[int(dtype)], device.type, device.index, &handle);
  return with_huge_pages(Tensor(handle));
}

inline Tensor empty_like(const Tensor& tensor) {
  // dtype, layout, device, pin_memory, memory_format: as the tensor's
  uint64_t stack[6] = {Boxed<Tensor>::give(Tensor(tensor))};
  UNIGEN_CALL(torch_call_dispatcher, "aten::empty_like", "", stack, kTorchVersion);
  return Boxed<Tensor>::take(stack[0]);
}

inline void copy_into(const Tensor& target, const Tensor& source) {
  uint64_t stack[3] = {Boxed<Tensor>::give(Tensor(target)), Boxed<Tensor>::give(Tensor(source)), false};
  UNIGEN_CALL(torch_call_dispatcher, "aten::copy_", "", stack, kTorchVersion);
  Boxed<Tensor>::take(stack[0]);
}

#endif

}  // namespace unigen
