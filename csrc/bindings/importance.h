// The ops of unigen_fast/importance.py.
#pragma once

#include "common.h"

namespace unigen {

// planes of row statistics
inline int64_t statistics_of(RowValue kind) { return kind == RowValue::iwgan ? 3 : 2; }

template <class Backend>
tuple<Tensor, Tensor> weight_rows(const Tensor& log_w, optional<int64_t> dim, RowValue kind, double temperature,
                                  const string& reduction) {
  auto builder = GridBuilder::over(log_w, dim);
  const auto rows = builder.row_sizes();
  const auto dtype = arithmetic_type(log_w.scalar_type());
  Tensor value = empty_value(log_w, builder, reduction);
  Dims planes = rows;
  planes.insert(0, statistics_of(kind));
  Tensor statistics = empty_contiguous(log_w, planes, dtype);

  WeightRows a;
  a.dtype = dtype_of(log_w);
  a.kind = kind;
  a.temperature = temperature;
  a.reduction = reduction_of(reduction, rows.product());
  builder.element(a.log_w, log_w);
  builder.row(a.value, value);
  builder.planes(a.statistics, statistics, statistics_of(kind));
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
  builder.result().element(a.grad_log_w, grad_log_w);
  builder.row(a.grad, grad);
  builder.planes(a.statistics, statistics, statistics_of(kind));
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
  builder.result().element(a.grad_log_w, grad_log_w);
  a.grid = builder.finish();
  Backend::weights_backward(a, log_w);
  return grad_log_w;
}

// ---- estimators ------------------------------------------------------------------------------------------------------

// Results in the order of the schema: `values` of them, then the statistics.
struct EstimatorResults {
  Tensor value[2], statistics;
};

// planes of row statistics
inline int64_t statistics_of(const EstimatorOptions& options) {
  switch (options.kind) {
    case EstimatorKind::tvo: return 2 * options.points - 1;
    case EstimatorKind::vimco: return 5;
    case EstimatorKind::diagnostics: return 4;
    default: return 2;
  }
}

template <class Backend>
EstimatorResults estimators(const Tensor& log_w, const Tensor* other, int64_t dim, const EstimatorOptions& options,
                            int values, const string& reduction, double scale = 1) {
  auto builder = GridBuilder::over(log_w, dim);
  Dims plane_sizes = builder.row_sizes();
  Estimators a;
  a.dtype = dtype_of(log_w);
  a.options = options;
  a.reduction = reduction_of(reduction, plane_sizes.product(), scale);
  builder.element(a.in[0], log_w);
  if (other) builder.element(a.in[1], *other);
  EstimatorResults results{{log_w, log_w}, log_w};
  for (int i = 0; i < values; ++i) {
    results.value[i] = empty_value(log_w, builder, reduction);
    builder.row(a.value[i], results.value[i]);
  }
  plane_sizes.insert(0, statistics_of(options));
  results.statistics = empty_contiguous(log_w, plane_sizes, arithmetic_type(log_w.scalar_type()));
  builder.planes(a.statistics, results.statistics, statistics_of(options));
  a.grid = builder.finish();
  Backend::estimators(a, log_w);
  return results;
}

template <class Backend>
tuple<Tensor, Tensor> estimators_backward(std::initializer_list<const Tensor*> grads, const Tensor& log_w,
                                          const Tensor* other, const Tensor* value, const Tensor& statistics, int64_t dim,
                                          const EstimatorOptions& options, int64_t needed, const string& reduction,
                                          double scale = 1) {
  auto builder = GridBuilder::over(log_w, dim);
  EstimatorsBackward a;
  a.dtype = dtype_of(log_w);
  a.options = options;
  a.reduction = reduction_of(reduction, builder.row_sizes().product(), scale);
  builder.element(a.in[0], log_w);
  if (other) builder.element(a.in[1], *other);
  int g = 0;
  for (const Tensor* grad : grads) builder.row(a.grad[g++], *grad);
  if (value) builder.row(a.value, *value);
  builder.planes(a.statistics, statistics, statistics_of(options));
  Tensor out[2] = {log_w, log_w};
  const Tensor* in[2] = {&log_w, other};
  for (int i = 0; i < (other ? 2 : 1); ++i) {
    out[i] = needed >> i & 1 ? empty_gradient(*in[i]) : empty_absent(log_w);
    if (needed >> i & 1) builder.result().element(a.out[i], out[i]);
  }
  a.grid = builder.finish();
  Backend::estimators_backward(a, log_w);
  return {out[0], out[1]};
}

template <class Backend>
tuple<Tensor, Tensor> power_bound_loss(const Tensor& log_w, int64_t dim, double power, double elbo_weight, double scale,
                                       const string& reduction) {
  const EstimatorOptions options = {EstimatorKind::power_bound, power, elbo_weight};
  const auto r = estimators<Backend>(log_w, nullptr, dim, options, 1, reduction, scale);
  return {r.value[0], r.statistics};
}

template <class Backend>
Tensor power_bound_loss_backward(const Tensor& grad, const Tensor& log_w, const Tensor& statistics, int64_t dim,
                                 double power, double elbo_weight, double scale, const string& reduction) {
  const EstimatorOptions options = {EstimatorKind::power_bound, power, elbo_weight};
  return std::get<0>(estimators_backward<Backend>({&grad}, log_w, nullptr, nullptr, statistics, dim, options, 1, reduction,
                                                  scale));
}

inline EstimatorOptions tvo_options(const vector<double>& partition) {
  UNIGEN_CHECK(partition.size() >= 2, "unigen_fast: expected a partition of at least two points");
  EstimatorOptions options;
  options.kind = EstimatorKind::tvo;
  options.partition = partition.data();
  options.points = int(partition.size());
  return options;
}

template <class Backend>
tuple<Tensor, Tensor> tvo_loss(const Tensor& log_w, int64_t dim, vector<double> partition, const string& reduction) {
  const auto r = estimators<Backend>(log_w, nullptr, dim, tvo_options(partition), 1, reduction);
  return {r.value[0], r.statistics};
}

template <class Backend>
Tensor tvo_loss_backward(const Tensor& grad, const Tensor& log_w, const Tensor& statistics, int64_t dim,
                         vector<double> partition, const string& reduction) {
  return std::get<0>(estimators_backward<Backend>({&grad}, log_w, nullptr, nullptr, statistics, dim,
                                                  tvo_options(partition), 1, reduction));
}

template <class Backend>
tuple<Tensor, Tensor> vimco_loss(const Tensor& log_w, const Tensor& log_q, int64_t dim, const string& reduction) {
  const auto r = estimators<Backend>(log_w, &log_q, dim, {EstimatorKind::vimco}, 1, reduction);
  return {r.value[0], r.statistics};
}

template <class Backend>
tuple<Tensor, Tensor> vimco_loss_backward(const Tensor& grad, const Tensor& log_w, const Tensor& log_q,
                                          const Tensor& statistics, int64_t dim, const string& reduction, int64_t needed) {
  return estimators_backward<Backend>({&grad}, log_w, &log_q, nullptr, statistics, dim, {EstimatorKind::vimco}, needed,
                                      reduction);
}

template <class Backend>
tuple<Tensor, Tensor, Tensor> rws_losses(const Tensor& log_p, const Tensor& log_q, int64_t dim, const string& reduction) {
  const auto r = estimators<Backend>(log_p, &log_q, dim, {EstimatorKind::rws}, 2, reduction);
  return {r.value[0], r.value[1], r.statistics};
}

template <class Backend>
tuple<Tensor, Tensor> rws_losses_backward(const Tensor& grad_theta, const Tensor& grad_phi, const Tensor& log_p,
                                          const Tensor& log_q, const Tensor& statistics, int64_t dim,
                                          const string& reduction, int64_t needed) {
  return estimators_backward<Backend>({&grad_theta, &grad_phi}, log_p, &log_q, nullptr, statistics, dim,
                                      {EstimatorKind::rws}, needed, reduction);
}

template <class Backend>
tuple<Tensor, Tensor> log_variance_loss(const Tensor& log_w, int64_t dim, const string& reduction) {
  const auto r = estimators<Backend>(log_w, nullptr, dim, {EstimatorKind::log_variance}, 1, reduction);
  return {r.value[0], r.statistics};
}

template <class Backend>
Tensor log_variance_loss_backward(const Tensor& grad, const Tensor& log_w, const Tensor& statistics, int64_t dim,
                                  const string& reduction) {
  return std::get<0>(estimators_backward<Backend>({&grad}, log_w, nullptr, nullptr, statistics, dim,
                                                  {EstimatorKind::log_variance}, 1, reduction));
}

template <class Backend>
tuple<Tensor, Tensor> importance_weighted_sum(const Tensor& log_w, const Tensor& payload, int64_t dim, double temperature) {
  const EstimatorOptions options = {EstimatorKind::weighted_sum, 1, 0, temperature};
  const auto r = estimators<Backend>(log_w, &payload, dim, options, 1, "none");
  return {r.value[0], r.statistics};
}

template <class Backend>
tuple<Tensor, Tensor> importance_weighted_sum_backward(const Tensor& grad, const Tensor& log_w, const Tensor& payload,
                                                       const Tensor& value, const Tensor& statistics, int64_t dim,
                                                       double temperature, int64_t needed) {
  const EstimatorOptions options = {EstimatorKind::weighted_sum, 1, 0, temperature};
  return estimators_backward<Backend>({&grad}, log_w, &payload, &value, statistics, dim, options, needed, "none");
}

template <class Backend>
Tensor weight_diagnostics(const Tensor& log_w, int64_t dim) {
  return estimators<Backend>(log_w, nullptr, dim, {EstimatorKind::diagnostics}, 0, "none").statistics;
}

template <class Backend>
Tensor pareto_shape(const Tensor& tail) {
  UNIGEN_CHECK(tail.dim() >= 1 && tail.size(-1) > 1 && tail.is_contiguous() &&
                      tail.scalar_type() == arithmetic_type(tail.scalar_type()),
                  "unigen_fast: expected contiguous rows of float32 or float64");
  ParetoShape a;
  a.dtype = dtype_of(tail);
  a.count = tail.size(-1) - 1;
  a.rows = tail.numel() / (a.count + 1);
  UNIGEN_CHECK(pareto_points(a.count) <= kMaxParetoPoints, "unigen_fast: a tail of ", a.count, " weights is too long");
  Dims sizes(tail.sizes());
  sizes.pop_back();
  Tensor shapes = empty_contiguous(tail, sizes, tail.scalar_type());
  a.values = tail.data_ptr();
  a.shapes = shapes.data_ptr();
  Backend::pareto_shape(a, tail);
  return shapes;
}

#define UNIGEN_IMPORTANCE_OPS(X) \
  X(log_mean_exp)                \
  X(log_mean_exp_backward)       \
  X(importance_weights)          \
  X(importance_weights_backward) \
  X(effective_sample_size)       \
  X(iwae_loss)                   \
  X(iwae_loss_backward)          \
  X(power_bound_loss)            \
  X(power_bound_loss_backward)   \
  X(tvo_loss)                    \
  X(tvo_loss_backward)           \
  X(vimco_loss)                  \
  X(vimco_loss_backward)         \
  X(rws_losses)                  \
  X(rws_losses_backward)         \
  X(log_variance_loss)           \
  X(log_variance_loss_backward)  \
  X(importance_weighted_sum)     \
  X(importance_weighted_sum_backward) \
  X(weight_diagnostics)          \
  X(pareto_shape)

}  // namespace unigen
