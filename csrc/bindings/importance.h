// The ops of unigen_fast/importance.py.
#pragma once

#include "common.h"

namespace unigen {

template <class Backend>
tuple<Tensor, Tensor> weight_rows(const Tensor& log_w, optional<int64_t> dim, RowValue kind, double temperature,
                                  const string& reduction) {
  auto builder = GridBuilder::over(log_w, dim);
  const auto rows = builder.row_sizes();
  const auto dtype = arithmetic_type(log_w.scalar_type());
  Tensor value = empty_value(log_w, builder, reduction);
  Dims planes = rows;
  planes.insert(0, kind == RowValue::iwgan ? 3 : 2);
  Tensor statistics = empty_contiguous(log_w, planes, dtype);

  WeightRows a;
  a.dtype = dtype_of(log_w);
  a.kind = kind;
  a.temperature = temperature;
  a.reduction = reduction_of(reduction, rows.product());
  builder.element(a.log_w, log_w);
  builder.row(a.value, value);
  builder.planes(a.statistics, statistics);
  a.grid = builder.finish();
  Backend::weight_rows(a, log_w);
  return {value, statistics};
}

template <class Backend>
Tensor weight_rows_backward(const Tensor& grad, const Tensor& log_w, const Tensor& statistics, optional<int64_t> dim,
                            RowValue kind, double temperature, bool detach, const string& reduction) {
  auto builder = GridBuilder::over(log_w, dim);
  Tensor grad_log_w = empty_gradient(log_w);

  WeightRowsBackward a;
  a.dtype = dtype_of(log_w);
  a.kind = kind;
  a.temperature = temperature;
  a.detach = detach;
  a.reduction = reduction_of(reduction, builder.row_sizes().product());
  builder.element(a.log_w, log_w);
  builder.element(a.grad_log_w, grad_log_w);
  builder.row(a.grad, grad);
  builder.planes(a.statistics, statistics);
  a.grid = builder.finish();
  Backend::weight_rows_backward(a, log_w);
  return grad_log_w;
}

template <class Backend>
tuple<Tensor, Tensor> log_mean_exp(const Tensor& log_w, int64_t dim) {
  return weight_rows<Backend>(log_w, dim, RowValue::log_mean_exp, 1.0, "none");
}

template <class Backend>
Tensor log_mean_exp_backward(const Tensor& grad, const Tensor& log_w, const Tensor& statistics, int64_t dim) {
  return weight_rows_backward<Backend>(grad, log_w, statistics, dim, RowValue::log_mean_exp, 1.0, true, "none");
}

template <class Backend>
tuple<Tensor, Tensor> iwae_loss(const Tensor& log_w, int64_t dim, const string& reduction, const string& value) {
  const auto kind = value == "surrogate" ? RowValue::minus_surrogate : RowValue::minus_log_mean_exp;
  return weight_rows<Backend>(log_w, dim, kind, 1.0, reduction);
}

template <class Backend>
Tensor iwae_loss_backward(const Tensor& grad, const Tensor& log_w, const Tensor& statistics, int64_t dim,
                          const string& reduction, const string&) {
  return weight_rows_backward<Backend>(grad, log_w, statistics, dim, RowValue::minus_log_mean_exp, 1.0, true, reduction);
}

template <class Backend>
Tensor effective_sample_size(const Tensor& log_w, int64_t dim) {
  auto builder = GridBuilder::over(log_w, dim);
  Tensor value = empty_value(log_w, builder, "none");
  WeightRows a;
  a.dtype = dtype_of(log_w);
  a.kind = RowValue::effective_sample_size;
  builder.element(a.log_w, log_w);
  builder.row(a.value, value);
  a.grid = builder.finish();
  Backend::weight_rows(a, log_w);
  return value;
}

template <class Backend>
Tensor importance_weights(const Tensor& log_w, int64_t dim, double temperature) {
  auto builder = GridBuilder::over(log_w, dim);
  Tensor weights = empty_contiguous(log_w, Dims(log_w.sizes()), arithmetic_type(log_w.scalar_type()));
  Weights a;
  a.dtype = dtype_of(log_w);
  a.temperature = temperature;
  builder.element(a.log_w, log_w);
  builder.element(a.weights, weights, weights.scalar_type());
  a.grid = builder.finish();
  Backend::weights(a, log_w);
  return weights;
}

template <class Backend>
Tensor importance_weights_backward(const Tensor& grad, const Tensor& log_w, const Tensor& weights, int64_t dim,
                                   double temperature) {
  auto builder = GridBuilder::over(log_w, dim);
  Tensor grad_log_w = empty_gradient(log_w);
  WeightsBackward a;
  a.dtype = dtype_of(log_w);
  a.temperature = temperature;
  builder.element(a.grad, grad, arithmetic_type(log_w.scalar_type()));
  builder.element(a.weights, weights, arithmetic_type(log_w.scalar_type()));
  builder.element(a.grad_log_w, grad_log_w);
  a.grid = builder.finish();
  Backend::weights_backward(a, log_w);
  return grad_log_w;
}

#define UNIGEN_IMPORTANCE_OPS(X) \
  X(log_mean_exp)                \
  X(log_mean_exp_backward)       \
  X(importance_weights)          \
  X(importance_weights_backward) \
  X(effective_sample_size)       \
  X(iwae_loss)                   \
  X(iwae_loss_backward)

}  // namespace unigen
