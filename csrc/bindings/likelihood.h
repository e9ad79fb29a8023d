// The ops of unigen_fast/likelihood.py.
#pragma once

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
  if (needed & 1) builder.element(a.grad_logits, grad_logits);
  if (needed & 2) builder.element(a.grad_x, grad_x);
  a.grid = builder.finish();
  Backend::bernoulli_log_prob_backward(a, logits);
  return {grad_logits, grad_x};
}

#define UNIGEN_LIKELIHOOD_OPS(X) \
  X(bernoulli_log_prob)          \
  X(bernoulli_log_prob_backward)

}  // namespace unigen
