// The ops of unigen_fast/objectives.py.
#pragma once

#include <array>

#include "likelihood.h"

namespace unigen {

constexpr int kBoundGradients = 8;  // of decoder, decoder_2, decoder_3, z, mean, logvar, prior_mean, prior_logvar

inline Likelihood likelihood_of(const string& name, bool second) {
  if (name == "bernoulli") return Likelihood::bernoulli;
  if (name == "gaussian") return second ? Likelihood::gaussian : Likelihood::unit_gaussian;
  if (name == "laplace") return Likelihood::laplace;
  if (name == "discretized_logistic") return Likelihood::discretized_logistic;
  if (name == "negative_binomial") return Likelihood::negative_binomial;
  STD_TORCH_CHECK(name == "zero_inflated_negative_binomial", "unigen_fast: unknown likelihood ", name);
  return Likelihood::zero_inflated_negative_binomial;
}

// The tensors and options of a bound, as the ops take them.
struct BoundCall {
  const Tensor &decoder;
  const optional<Tensor>&decoder_2, &decoder_3;
  const Tensor &x, &z, &mean, &logvar;
  const optional<Tensor>&prior_mean, &prior_logvar;
  int64_t dim, event_ndims;
  const string& likelihood;
  const vector<double>& bins;
  int64_t groups;
  double power, elbo_weight, scale;
  const string& reduction;

  int64_t rows() const { return decoder.dim() - event_ndims; }

  Dims row_sizes() const {
    Dims sizes;
    for (int64_t d = 0; d < rows(); ++d) sizes.push_back(decoder.size(d));
    return sizes;
  }

  // All of the arguments, those that only one of the two kernels has by own(a, builder of the event's grid); `grads` are
  // made, those whose bit of `wanted` is not set empty.
  template <class Arguments, class Own>
  void describe(Arguments& a, int64_t wanted, std::array<Tensor, kBoundGradients>& grads, const Tensor& log_w,
                const Tensor& residual, const Own& own) const {
    GridBuilder event = GridBuilder::of_samples(decoder, rows(), dim), latent = GridBuilder::of_samples(z, rows(), dim);
    a.dtype = dtype_of(decoder);
    a.latent_dtype = dtype_of(z);
    a.likelihood.likelihood = likelihood_of(likelihood, decoder_2.has_value());
    if (bins.size() == 3) a.likelihood.bins = {bins[0], bins[1], bins[2]};
    a.samples = decoder.size(dim);
    a.groups = groups;
    a.power = power;
    a.elbo_weight = elbo_weight;
    a.reduction = reduction_of(reduction, event.examples(), scale);
    event.row(a.log_w, log_w);
    event.row(a.residual, residual);
    own(a, event);
    int bit = 0;
    const auto gradient = [&](const Tensor* tensor) {
      const bool is_wanted = tensor && (wanted >> bit & 1);
      grads[bit] = is_wanted ? empty_gradient(*tensor) : empty_absent(decoder);
      return is_wanted ? &grads[bit++] : (++bit, nullptr);
    };
    event.of_example(a.x, x);
    const Tensor* outputs[kMaxDecoderOutputs] = {&decoder, decoder_2 ? &*decoder_2 : nullptr,
                                                 decoder_3 ? &*decoder_3 : nullptr};
    for (int k = 0; k < kMaxDecoderOutputs; ++k) {
      const Tensor* grad = gradient(outputs[k]);
      if (!outputs[k]) continue;
      a.shared[k] = outputs[k]->dim() == event_ndims && rows() > 0;
      for (const auto& [operand, tensor] : {std::pair{&a.decoder[k], outputs[k]}, {&a.grad_decoder[k], grad}}) {
        if (!tensor) continue;
        if (a.shared[k]) event.of_event(*operand, *tensor);
        else event.element(*operand, *tensor);
      }
    }
    latent.element(a.z, z);
    if (const Tensor* grad = gradient(&z)) latent.element(a.grad_z, *grad);
    const auto of_example = [&](Operand& operand, Operand& grad_operand, const Tensor* tensor) {
      if (tensor) latent.of_example(operand, *tensor);
      if (const Tensor* grad = gradient(tensor)) latent.of_example(grad_operand, *grad);
    };
    of_example(a.mean, a.grad_mean, &mean);
    of_example(a.logvar, a.grad_logvar, &logvar);
    of_example(a.prior_mean, a.grad_prior_mean, prior_mean ? &*prior_mean : nullptr);
    of_example(a.prior_logvar, a.grad_prior_logvar, prior_logvar ? &*prior_logvar : nullptr);
    a.grid = event.finish_samples();
    a.latent = latent.finish_samples();
  }
};

using BoundGradients = tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BoundResult = decltype(std::tuple_cat(tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(), BoundGradients()));

template <class Backend>
BoundResult multi_sample_bound(const Tensor& decoder, const optional<Tensor>& decoder_2, const optional<Tensor>& decoder_3,
                               const Tensor& x, const Tensor& z, const Tensor& mean, const Tensor& logvar,
                               const optional<Tensor>& prior_mean, const optional<Tensor>& prior_logvar, int64_t dim,
                               int64_t event_ndims, const string& likelihood, const vector<double>& bins, int64_t groups,
                               double power, double elbo_weight, double scale, const string& reduction,
                               int64_t gradients) {
  const BoundCall call = {decoder, decoder_2, decoder_3, x, z, mean, logvar, prior_mean, prior_logvar, dim, event_ndims,
                          likelihood, bins, groups, power, elbo_weight, scale, reduction};
  const auto dtype = arithmetic_type(decoder.scalar_type());
  Dims sizes = call.row_sizes();
  Tensor log_w = empty_contiguous(decoder, sizes, dtype), residual = empty_contiguous(decoder, sizes, dtype);
  sizes.erase(dim);
  Tensor bound = empty_contiguous(decoder, sizes, dtype), ess = empty_contiguous(decoder, sizes, dtype);
  Tensor value = empty_contiguous(decoder, reduction == "none" ? sizes : Dims{}, dtype);
  SampledBound a;
  std::array<Tensor, kBoundGradients> grads;
  call.describe(a, gradients, grads, log_w, residual, [&](SampledBound& own, GridBuilder& event) {
    event.row_of_example(own.bound, bound);
    event.row_of_example(own.ess, ess);
    if (!own.reduction.reduce) event.row_of_example(own.value, value);
    own.value.data = value.data_ptr();
  });
  a.gradients = gradients != 0;
  Backend::sampled_bound(a, decoder);
  return std::tuple_cat(std::make_tuple(value, log_w, bound, ess, residual), tuple_of(grads));
}

template <class Backend>
BoundGradients multi_sample_bound_backward(
    const Tensor& grad_loss, const Tensor& grad_log_w, const Tensor& decoder, const optional<Tensor>& decoder_2,
    const optional<Tensor>& decoder_3, const Tensor& x, const Tensor& z, const Tensor& mean, const Tensor& logvar,
    const optional<Tensor>& prior_mean, const optional<Tensor>& prior_logvar, const Tensor& log_w, const Tensor& residual,
    int64_t dim, int64_t event_ndims, const string& likelihood, const vector<double>& bins, int64_t groups, double power,
    double elbo_weight, double scale, const string& reduction, int64_t, int64_t needed) {
  const BoundCall call = {decoder, decoder_2, decoder_3, x, z, mean, logvar, prior_mean, prior_logvar, dim, event_ndims,
                          likelihood, bins, groups, power, elbo_weight, scale, reduction};
  SampledBoundBackward a;
  std::array<Tensor, kBoundGradients> grads;
  call.describe(a, needed, grads, log_w, residual, [&](SampledBoundBackward& own, GridBuilder& event) {
    event.row(own.grad_log_w, grad_log_w);
    event.row_of_example(own.grad_value, grad_loss);
  });
  Backend::sampled_bound_backward(a, decoder);
  return tuple_of(grads);
}

#define UNIGEN_OBJECTIVES_OPS(X) \
  X(multi_sample_bound)          \
  X(multi_sample_bound_backward)

}  // namespace unigen
