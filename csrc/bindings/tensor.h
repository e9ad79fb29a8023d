// What the ops know of torch. The modules that register them see its stable ABI; `_autograd`, which calls them past the
// dispatcher, sees ATen (UNIGEN_ATEN). A tensor has the same methods in both; the rest is here.
#pragma once

#ifdef UNIGEN_ATEN
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#else
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
#endif
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace unigen {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

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

using torch::stable::Tensor;
using torch::stable::empty_like;

inline void copy_into(Tensor target, const Tensor& source) { torch::stable::copy_(target, source); }

inline Tensor empty_strided(const Tensor& like, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, code, device_type, device_index, &handle));
  return with_huge_pages(Tensor(handle));
}

#endif

}  // namespace unigen
