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

namespace unigen {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

#ifdef UNIGEN_ATEN

using at::Tensor;
using at::empty_like;

// on the CPU, as all that is called directly
inline Tensor empty_strided(const Tensor&, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  return at::detail::empty_strided_cpu(at::IntArrayRef(sizes, ndim), at::IntArrayRef(strides, ndim), dtype);
}

#else

using torch::stable::Tensor;
using torch::stable::empty_like;

inline Tensor empty_strided(const Tensor& like, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

#endif

}  // namespace unigen
