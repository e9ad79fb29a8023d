// The ops with a dimension of classes, of unigen_fast/divergence.py and unigen_fast/likelihood.py.
#pragma once

#include "common.h"

namespace unigen {

// Both sides of a KL, of one number of classes.
template <class Arguments>
void describe_pair(Arguments& a, GridBuilder& builder, const Tensor& q, const Tensor* p, int64_t class_dim) {
  a.dtype = dtype_of(q);
  a.classes = q.size(class_dim);
  builder.vectors(a.logits_q, q, class_dim);
  if (!p) return;
  builder.vectors(a.logits_p, *p, class_dim);
  UNIGEN_CHECK(p->size(class_dim) == a.classes, "unigen_fast: got ", p->size(class_dim), " classes, expected ", a.classes);
}

template <class Backend>
Tensor categorical_kl(const Tensor& logits_q, const optional<Tensor>& logits_p, const optional<Tensor>& weights,
                      int64_t class_dim, int64_t event_ndims, double unimix, double scale, const string& reduction) {
  auto builder = GridBuilder::without(logits_q, class_dim, event_ndims);
  Tensor value = empty_value(logits_q, builder, reduction);
  CategoricalKl a;
  describe_pair(a, builder, logits_q, logits_p ? &*logits_p : nullptr, class_dim);
  a.unimix = unimix_of(unimix, a.classes);
  a.reduction = reduction_of(reduction, builder.row_sizes().product(), scale);
  if (weights) builder.row(a.weights, *weights);
  builder.row(a.value, value);
  a.grid = builder.finish();
  Backend::categorical_kl(a, logits_q);
  return value;
}

// the gradients that are wanted of a pair of tensors, as operands
inline tuple<Tensor, Tensor> vector_gradients(GridBuilder& builder, const Tensor& first, const optional<Tensor>& second,
                                              Vectors& of_first, Vectors& of_second, int64_t dim, int64_t needed) {
  const auto gradient = [&](int bit, Vectors& vectors, const optional<Tensor>& tensor) {
    if (!(needed >> bit & 1) || !tensor) return empty_absent(first);
    Tensor result = empty_gradient(*tensor);
    builder.result().vectors(vectors, result, dim);
    return result;
  };
  Tensor a = gradient(0, of_first, first);
  return {a, gradient(1, of_second, second)};
}

template <class Backend>
tuple<Tensor, Tensor> categorical_kl_backward(const Tensor& grad, const Tensor& logits_q, const optional<Tensor>& logits_p,
                                              const optional<Tensor>& weights, int64_t class_dim, int64_t event_ndims,
                                              double unimix, double scale, const string& reduction, int64_t needed) {
  auto builder = GridBuilder::without(logits_q, class_dim, event_ndims);
  CategoricalKlBackward a;
  describe_pair(a, builder, logits_q, logits_p ? &*logits_p : nullptr, class_dim);
  a.unimix = unimix_of(unimix, a.classes);
  a.reduction = reduction_of(reduction, builder.row_sizes().product(), scale);
  builder.row(a.grad, grad);
  if (weights) builder.row(a.weights, *weights);
  auto gradients = vector_gradients(builder, logits_q, logits_p, a.grad_q, a.grad_p, class_dim, needed);
  a.grid = builder.finish();
  Backend::categorical_kl_backward(a, logits_q);
  return gradients;
}

template <class Arguments>
void set_free_nats(Arguments& a, double free_nats, const string& mode) {
  if (free_nats > 0) (mode == "per_variable" ? a.site_floor : a.row_floor) = free_nats;
}

template <class Backend>
tuple<Tensor, Tensor, Tensor, Tensor> balanced_categorical_kl(const Tensor& posterior, const Tensor& prior,
                                                              int64_t event_ndims, double free_nats,
                                                              const string& free_nats_mode, double unimix,
                                                              double dynamics_scale, double representation_scale) {
  const int64_t class_dim = posterior.dim() - 1;
  auto builder = GridBuilder::without(posterior, class_dim, event_ndims);
  const auto dtype = arithmetic_type(posterior.scalar_type());
  Tensor loss = empty_contiguous(posterior, {}, dtype), dynamics = empty_contiguous(posterior, {}, dtype);
  Tensor representation = empty_contiguous(posterior, {}, dtype);
  CategoricalKl a;
  describe_pair(a, builder, posterior, &prior, class_dim);
  a.unimix = unimix_of(unimix, a.classes);
  a.reduction = reduction_of("mean", builder.row_sizes().product());
  set_free_nats(a, free_nats, free_nats_mode);
  const bool keep_rows = a.row_floor > -HUGE_VAL;
  Tensor rows = empty_contiguous(posterior, keep_rows ? builder.row_sizes() : Dims{0}, dtype);
  if (keep_rows) builder.row(a.rows, rows);
  builder.row(a.value, dynamics);
  a.copy = representation.data_ptr();
  a.loss = loss.data_ptr();
  a.loss_scale = dynamics_scale + representation_scale;  // the two are one number: only their gradients differ
  a.grid = builder.finish();
  Backend::categorical_kl(a, posterior);
  return {loss, dynamics, representation, rows};
}

template <class Backend>
tuple<Tensor, Tensor> balanced_categorical_kl_backward(const Tensor& grad_loss, const Tensor& grad_dynamics,
                                                       const Tensor& grad_representation, const Tensor& posterior,
                                                       const Tensor& prior, const Tensor& rows, int64_t event_ndims,
                                                       double free_nats, const string& free_nats_mode, double unimix,
                                                       double dynamics_scale, double representation_scale, int64_t needed) {
  const int64_t class_dim = posterior.dim() - 1;
  auto builder = GridBuilder::without(posterior, class_dim, event_ndims);
  CategoricalKlBackward a;
  describe_pair(a, builder, posterior, &prior, class_dim);
  a.unimix = unimix_of(unimix, a.classes);
  a.reduction = reduction_of("mean", builder.row_sizes().product());
  a.factor_q = representation_scale;
  a.factor_p = dynamics_scale;
  set_free_nats(a, free_nats, free_nats_mode);
  builder.row(a.grad, grad_loss);
  builder.row(a.grad_own_q, grad_representation);
  builder.row(a.grad_own_p, grad_dynamics);
  if (a.row_floor > -HUGE_VAL) builder.row(a.rows, rows);
  auto gradients = vector_gradients(builder, posterior, prior, a.grad_q, a.grad_p, class_dim, needed);
  a.grid = builder.finish();
  Backend::categorical_kl_backward(a, posterior);
  return gradients;
}

template <class Backend>
Tensor categorical_log_prob(const Tensor& logits, const Tensor& x, int64_t class_dim, int64_t event_ndims,
                            int64_t ignore_index) {
  auto builder = GridBuilder::without(logits, class_dim, event_ndims);
  Tensor value = empty_value(logits, builder, "none");
  CategoricalLogProb a;
  a.dtype = dtype_of(logits);
  a.classes = logits.size(class_dim);
  a.ignore_index = ignore_index;
  builder.vectors(a.logits, logits, class_dim);
  builder.element(a.x, x, ScalarType::Long);
  builder.row(a.value, value);
  a.grid = builder.finish();
  Backend::categorical_log_prob(a, logits);
  return value;
}

template <class Backend>
Tensor categorical_log_prob_backward(const Tensor& grad, const Tensor& logits, const Tensor& x, int64_t class_dim,
                                     int64_t event_ndims, int64_t ignore_index) {
  auto builder = GridBuilder::without(logits, class_dim, event_ndims);
  Tensor grad_logits = empty_gradient(logits);
  CategoricalLogProbBackward a;
  a.dtype = dtype_of(logits);
  a.classes = logits.size(class_dim);
  a.ignore_index = ignore_index;
  builder.row(a.grad, grad);
  builder.vectors(a.logits, logits, class_dim);
  builder.element(a.x, x, ScalarType::Long);
  builder.result().vectors(a.grad_logits, grad_logits, class_dim);
  a.grid = builder.finish();
  Backend::categorical_log_prob_backward(a, logits);
  return grad_logits;
}

template <class Arguments>
void set_mixture(Arguments& a, const Tensor& params, const Tensor& x) {
  a.dtype = dtype_of(params);
  UNIGEN_CHECK(params.dim() > 0 && x.dim() > 0, "unigen_fast: expected a dimension of channels");
  a.channels = int(x.size(x.dim() - 1));
  UNIGEN_CHECK(a.channels == 1 || a.channels == 3, "unigen_fast: expected 1 or 3 channels");
  const int64_t size = params.size(params.dim() - 1), each = a.channels == 3 ? 10 : 3;
  a.mixtures = size / each;
  UNIGEN_CHECK(size % each == 0, "unigen_fast: got ", size, " parameters, expected a multiple of ", each);
}

template <class Backend>
Tensor discretized_logistic_mixture_log_prob(const Tensor& params, const Tensor& x, int64_t event_ndims) {
  const int64_t last = params.dim() - 1;
  auto builder = GridBuilder::without(params, last, event_ndims);
  Tensor value = empty_value(params, builder, "none");
  LogisticMixture a;
  set_mixture(a, params, x);
  builder.vectors(a.params, params, last);
  builder.vectors(a.x, x, last);
  builder.row(a.value, value);
  a.grid = builder.finish();
  Backend::logistic_mixture(a, params);
  return value;
}

template <class Backend>
tuple<Tensor, Tensor> discretized_logistic_mixture_log_prob_backward(const Tensor& grad, const Tensor& params,
                                                                     const Tensor& x, int64_t event_ndims,
                                                                     int64_t needed) {
  const int64_t last = params.dim() - 1;
  auto builder = GridBuilder::without(params, last, event_ndims);
  LogisticMixtureBackward a;
  set_mixture(a, params, x);
  builder.row(a.grad, grad);
  builder.vectors(a.params, params, last);
  builder.vectors(a.x, x, last);
  auto gradients = vector_gradients(builder, params, x, a.grad_params, a.grad_x, last, needed);
  a.grid = builder.finish();
  Backend::logistic_mixture_backward(a, params);
  return gradients;
}

#define UNIGEN_CATEGORICAL_OPS(X)          \
  X(categorical_kl)                        \
  X(categorical_kl_backward)               \
  X(balanced_categorical_kl)               \
  X(balanced_categorical_kl_backward)      \
  X(categorical_log_prob)                  \
  X(categorical_log_prob_backward)         \
  X(discretized_logistic_mixture_log_prob) \
  X(discretized_logistic_mixture_log_prob_backward)

}  // namespace unigen
