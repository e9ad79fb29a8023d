// What the ops of every family need: allocation and options.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "grid_builder.h"

namespace unigen {

using std::optional;
using std::string;
using std::tuple;
using std::vector;

// ---- allocation ------------------------------------------------------------------------------------------------------

inline Tensor empty_absent(const Tensor& like) { return empty_contiguous(like, {0}, like.scalar_type()); }

// torch.empty_like, without the dispatcher where the tensor is contiguous, or a piece of one that is
inline Tensor empty_gradient(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t ndim = int64_t(sizes.size());
  if (tensor.is_contiguous()) return empty_strided(tensor, ndim, sizes.data(), strides.data(), tensor.scalar_type());
  bool nested = true;  // each dimension beyond the next one
  for (int64_t d = 0; d < ndim; ++d)
    nested = nested && sizes[d] > 1 && strides[d] >= (d + 1 < ndim ? strides[d + 1] * sizes[d + 1] : 1);
  return nested ? empty_contiguous(tensor, Dims(sizes), tensor.scalar_type()) : empty_like(tensor);
}

// ---- checks of what is read as one piece -----------------------------------------------------------------------------

// numbers in a row, of the arithmetic type
inline void check_buffer(const Tensor& tensor, const Tensor& like, int64_t numel) {
  UNIGEN_CHECK(tensor.scalar_type() == arithmetic_type(like.scalar_type()) && tensor.device() == like.device() &&
                      tensor.is_contiguous() && int64_t(tensor.numel()) == numel,
                  "unigen_fast: expected ", numel, " numbers of ",
                  toString(arithmetic_type(like.scalar_type())), " in a row");
}

// the gradient of a reduced loss
inline void check_number(const Tensor& tensor, const Tensor& like) { check_buffer(tensor, like, 1); }

// ---- options ---------------------------------------------------------------------------------------------------------

// `rows` is what a mean divides by.
inline Reduction reduction_of(const string& name, int64_t rows, double scale = 1) {
  UNIGEN_CHECK(name == "mean" || name == "sum" || name == "none", "unigen_fast: unknown reduction ", name);
  return {name != "none", scale, name == "mean" ? double(rows) : 1.0};
}

inline Spread spread_of(const string& name) {
  if (name == "std") return Spread::std;
  if (name == "logstd") return Spread::logstd;
  UNIGEN_CHECK(name == "logvar", "unigen_fast: unknown spread ", name);
  return Spread::logvar;
}

// a row value or, if reduced, one number
inline Tensor empty_value(const Tensor& like, const GridBuilder& builder, const string& reduction) {
  const auto dtype = arithmetic_type(like.scalar_type());
  return empty_contiguous(like, reduction == "none" ? builder.row_sizes() : Dims{}, dtype);
}

}  // namespace unigen
