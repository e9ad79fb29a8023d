// The ops of unigen_fast/likelihood.py.
#pragma once

#include <array>

#include "common.h"

namespace unigen {

template <class Backend>
Tensor bernoulli_log_prob(const Tensor& logits, const Tensor& x, int64_t event_ndims) {
  GridBuilder builder(logits, logits.dim() - event_ndims);
  Tensor value = empty_value(logits, builder, "none");
  BernoulliLogProb a;
  a.dtype = dtype_of(logits);
  builder.element(a.logits, logits);
  builder.element(a.x, x);
  builder.row(a.value, value);
  a.grid = builder.finish();
  Backend::bernoulli_log_prob(a, logits);
  return value;
}

template <class Backend>
tuple<Tensor, Tensor> bernoulli_log_prob_backward(const Tensor& grad, const Tensor& logits, const Tensor& x,
                                                  int64_t event_ndims, int64_t needed) {
  GridBuilder builder(logits, logits.dim() - event_ndims);
  Tensor grad_logits = needed & 1 ? empty_gradient(logits) : empty_absent(logits);
  Tensor grad_x = needed & 2 ? empty_gradient(x) : empty_absent(logits);
  BernoulliLogProbBackward a;
  a.dtype = dtype_of(logits);
  builder.row(a.grad, grad);
  builder.element(a.logits, logits);
  builder.element(a.x, x);
  if (needed & 1) builder.result().element(a.grad_logits, grad_logits);
  if (needed & 2) builder.result().element(a.grad_x, grad_x);
  a.grid = builder.finish();
  Backend::bernoulli_log_prob_backward(a, logits);
  return {grad_logits, grad_x};
}

// ---- formulas --------------------------------------------------------------------------------------------------------

// One sum of a formula over the event, of every op below and of those in divergence.h.
struct FormulaCall {
  FormulaOptions options;
  int64_t event_ndims;
  double scale = 1;
  string reduction = "none";

  // A reduced loss has all dimensions as columns, in whichever order lies best in memory.
  int64_t first_column(const Tensor& like) const { return reduction == "none" ? like.dim() - event_ndims : 0; }

  Reduction reduction_over(const Tensor& like) const {
    int64_t rows = 1;
    for (int64_t d = 0; d < like.dim() - event_ndims; ++d) rows *= like.size(d);
    return reduction_of(reduction, rows, scale);
  }
};

template <size_t n>
auto tuple_of(const std::array<Tensor, n>& tensors) {
  return std::apply([](const auto&... each) { return std::make_tuple(each...); }, tensors);
}

using Given = std::initializer_list<const Tensor*>;  // the formula's numbers, in its order

template <class Backend>
Tensor run_formula(const FormulaCall& call, Given tensors, const optional<Tensor>& weights = std::nullopt) {
  const Tensor& first = **tensors.begin();
  GridBuilder builder(first, call.first_column(first));
  RowFormula a;
  a.dtype = dtype_of(first);
  a.options = call.options;
  a.reduction = call.reduction_over(first);
  Tensor value = empty_value(first, builder, call.reduction);
  int k = 0;
  for (const Tensor* tensor : tensors) builder.element(a.in[k++], *tensor);
  if (weights) builder.leading(a.weights, *weights);
  if (!a.reduction.reduce) builder.row(a.value, value);
  a.value.data = value.data_ptr();
  a.grid = builder.finish();
  Backend::row_formula(a, first);
  return value;
}

// Gradients of the tensors, those whose bit of `needed` is not set being empty.
template <int n, class Backend>
std::array<Tensor, n> run_formula_backward(FormulaCall call, const Tensor& grad, Given tensors, int64_t needed,
                                           const optional<Tensor>& weights = std::nullopt) {
  const Tensor& first = **tensors.begin();
  GridBuilder builder(first, call.first_column(first));
  RowFormulaBackward a;
  a.dtype = dtype_of(first);
  a.options = call.options;
  a.options.data_slope = needed & 1;
  a.reduction = call.reduction_over(first);
  builder.row(a.grad, grad);
  std::array<Tensor, n> grads;
  int k = 0;
  for (const Tensor* tensor : tensors) {
    builder.element(a.in[k], *tensor);
    grads[k] = needed >> k & 1 ? empty_gradient(*tensor) : empty_absent(first);
    if (needed >> k & 1) builder.result().element(a.grad_in[k], grads[k]);
    ++k;
  }
  if (weights) builder.leading(a.weights, *weights);
  a.grid = builder.finish();
  Backend::row_formula_backward(a, first);
  return grads;
}

template <class Backend>
Tensor gaussian_log_prob(const Tensor& x, const Tensor& mean, const Tensor& logvar, int64_t event_ndims,
                         const string& spread, double clamp_min, double clamp_max) {
  const FormulaCall call = {{Formula::gaussian_log_prob, {spread_of(spread), clamp_min, clamp_max}}, event_ndims};
  return run_formula<Backend>(call, {&x, &mean, &logvar});
}
template <class Backend>
tuple<Tensor, Tensor, Tensor> gaussian_log_prob_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                         const Tensor& logvar, int64_t event_ndims, const string& spread,
                                                         double clamp_min, double clamp_max, int64_t needed) {
  const FormulaCall call = {{Formula::gaussian_log_prob, {spread_of(spread), clamp_min, clamp_max}}, event_ndims};
  return tuple_of(run_formula_backward<3, Backend>(call, grad, {&x, &mean, &logvar}, needed));
}

template <class Backend>
Tensor laplace_log_prob(const Tensor& x, const Tensor& mean, const Tensor& log_scale, int64_t event_ndims) {
  return run_formula<Backend>({{Formula::laplace_log_prob}, event_ndims}, {&x, &mean, &log_scale});
}
template <class Backend>
tuple<Tensor, Tensor, Tensor> laplace_log_prob_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                        const Tensor& log_scale, int64_t event_ndims, int64_t needed) {
  const FormulaCall call = {{Formula::laplace_log_prob}, event_ndims};
  return tuple_of(run_formula_backward<3, Backend>(call, grad, {&x, &mean, &log_scale}, needed));
}

inline FormulaCall discretized_logistic(int64_t event_ndims, double half_bin, double low, double high) {
  FormulaCall call = {{Formula::discretized_logistic_log_prob}, event_ndims};
  call.options.bins = {half_bin, low, high};
  return call;
}
template <class Backend>
Tensor discretized_logistic_log_prob(const Tensor& x, const Tensor& mean, const Tensor& log_scale, int64_t event_ndims,
                                     double half_bin, double low, double high) {
  return run_formula<Backend>(discretized_logistic(event_ndims, half_bin, low, high), {&x, &mean, &log_scale});
}
template <class Backend>
tuple<Tensor, Tensor, Tensor> discretized_logistic_log_prob_backward(const Tensor& grad, const Tensor& x,
                                                                     const Tensor& mean, const Tensor& log_scale,
                                                                     int64_t event_ndims, double half_bin, double low,
                                                                     double high, int64_t needed) {
  const FormulaCall call = discretized_logistic(event_ndims, half_bin, low, high);
  return tuple_of(run_formula_backward<3, Backend>(call, grad, {&x, &mean, &log_scale}, needed));
}

inline FormulaCall of_counts(Formula formula, int64_t event_ndims, double eps) {
  FormulaCall call = {{formula}, event_ndims};
  call.options.eps = eps;
  return call;
}

template <class Backend>
Tensor negative_binomial_log_prob(const Tensor& x, const Tensor& mu, const Tensor& theta, int64_t event_ndims,
                                  double eps) {
  const FormulaCall call = of_counts(Formula::negative_binomial_log_prob, event_ndims, eps);
  return run_formula<Backend>(call, {&x, &mu, &theta});
}
template <class Backend>
tuple<Tensor, Tensor, Tensor> negative_binomial_log_prob_backward(const Tensor& grad, const Tensor& x, const Tensor& mu,
                                                                  const Tensor& theta, int64_t event_ndims, double eps,
                                                                  int64_t needed) {
  const FormulaCall call = of_counts(Formula::negative_binomial_log_prob, event_ndims, eps);
  return tuple_of(run_formula_backward<3, Backend>(call, grad, {&x, &mu, &theta}, needed));
}

template <class Backend>
Tensor zero_inflated_negative_binomial_log_prob(const Tensor& x, const Tensor& mu, const Tensor& theta,
                                                const Tensor& gate_logits, int64_t event_ndims, double eps) {
  const FormulaCall call = of_counts(Formula::zero_inflated_negative_binomial_log_prob, event_ndims, eps);
  return run_formula<Backend>(call, {&x, &mu, &theta, &gate_logits});
}
template <class Backend>
tuple<Tensor, Tensor, Tensor, Tensor> zero_inflated_negative_binomial_log_prob_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mu, const Tensor& theta, const Tensor& gate_logits,
    int64_t event_ndims, double eps, int64_t needed) {
  const FormulaCall call = of_counts(Formula::zero_inflated_negative_binomial_log_prob, event_ndims, eps);
  return tuple_of(run_formula_backward<4, Backend>(call, grad, {&x, &mu, &theta, &gate_logits}, needed));
}

#define UNIGEN_LIKELIHOOD_OPS(X)                     \
  X(bernoulli_log_prob)                              \
  X(bernoulli_log_prob_backward)                     \
  X(gaussian_log_prob)                               \
  X(gaussian_log_prob_backward)                      \
  X(laplace_log_prob)                                \
  X(laplace_log_prob_backward)                       \
  X(discretized_logistic_log_prob)                   \
  X(discretized_logistic_log_prob_backward)          \
  X(negative_binomial_log_prob)                      \
  X(negative_binomial_log_prob_backward)             \
  X(zero_inflated_negative_binomial_log_prob)        \
  X(zero_inflated_negative_binomial_log_prob_backward)

}  // namespace unigen
