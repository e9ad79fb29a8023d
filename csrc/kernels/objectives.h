// What the kernels of objectives are given: columns are the event, and in a grid of their own with the same rows, the
// latent.
#pragma once

#include "likelihood.h"
#include "problem.h"

namespace unigen {

enum class Likelihood : int {
  bernoulli,
  unit_gaussian,
  gaussian,
  laplace,
  discretized_logistic,
  negative_binomial,
  zero_inflated_negative_binomial
};

constexpr int kMaxDecoderOutputs = 3;

struct LikelihoodOptions {
  Likelihood likelihood = Likelihood::bernoulli;
  Bins bins;
};

// What has a likelihood, and Gaussians q and p of the latent. Each gradient may be absent: not wanted.
struct ObjectiveTensors : Problem {
  LikelihoodOptions likelihood;
  Operand x;
  // as many as the likelihood takes beside x; a shared one is the same in all rows (row strides 0)
  Operand decoder[kMaxDecoderOutputs];
  Operand grad_decoder[kMaxDecoderOutputs];  // of a shared one, the sum over all rows
  bool shared[kMaxDecoderOutputs] = {};

  Grid latent;  // the same rows × the latent's elements
  DType latent_dtype = DType::float32;
  Operand mean, logvar, prior_mean, prior_logvar;  // the prior's may be absent: 0
  Operand grad_mean, grad_logvar, grad_prior_mean, grad_prior_logvar;

  Reduction reduction;
};

// Of each row log p(x | decoder) and KL(q || p). The loss is that of weight · (kl_weight · KL - log p).
struct ElboTensors : ObjectiveTensors {
  Operand weights;  // over the rows, of the arithmetic type as all below; absent: 1
  double kl_weight = 1;
};

// With `gradients` also those of the loss, where it is reduced.
struct ElboLoss : ElboTensors {
  Operand log_likelihood, kl;
  Operand value;  // over the rows, unless reduced: then one number
  bool gradients = false;
};

// Gradients of grad_value · loss + grad_log_likelihood · log_likelihood + grad_kl · kl.
struct ElboLossBackward : ElboTensors {
  Operand grad_log_likelihood, grad_kl;
  Operand grad_value;  // row strides 0 if reduced
};

// Rows are examples × samples, the samples innermost (whichever dimension they are): x, the Gaussians and their gradients,
// sums over the samples, have row strides 0 along them. The gradients are those of the sum of coefficient · log_w: the
// coefficients are the kernel's own matter.
struct BoundTensors : ObjectiveTensors {
  Operand z, grad_z;

  // The samples of an example are `groups` stretches of equal length; the bound is the mean over them of
  // PowerBound (formulas/importance.h), and reduced or scaled by `reduction`, whose rows are the examples.
  int64_t samples = 1, groups = 1;
  double power = 1, elbo_weight = 0;

  // over the rows, of the arithmetic type as all below: log_w, and what rounding has taken from it (0 if it is not finite)
  Operand log_w, residual;
};

// log_w and residual; of each example the bound and the effective sample size (means over the groups); the loss. With
// `gradients` also those of the loss, where it is reduced.
struct SampledBound : BoundTensors {
  Operand bound, ess;  // over the examples: row strides 0 along the samples
  Operand value;       // the same, unless reduced: then one number
  bool gradients = false;
};

// Gradients, given log_w and residual, of grad_value · loss + grad_log_w · log_w.
struct SampledBoundBackward : BoundTensors {
  Operand grad_log_w;  // over the rows
  Operand grad_value;  // row strides 0 along the samples; all 0 if reduced
};

#define UNIGEN_OBJECTIVES_KERNELS(X)      \
  X(elbo_loss, ElboLoss)                  \
  X(elbo_loss_backward, ElboLossBackward) \
  X(sampled_bound, SampledBound)          \
  X(sampled_bound_backward, SampledBoundBackward)

}  // namespace unigen
