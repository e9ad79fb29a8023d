// The ops of unigen_fast/objectives.py.
#pragma once

#include <array>

#include "likelihood.h"

namespace unigen {

constexpr int kBoundGradients = 8;  // of decoder, decoder_2, decoder_3, z, mean, logvar, prior_mean, prior_logvar
constexpr int kElboGradients = 7;   // the same without z

inline Likelihood likelihood_of(const string& name, bool second) {
  if (name == "bernoulli") return Likelihood::bernoulli;
  if (name == "gaussian") return second ? Likelihood::gaussian : Likelihood::unit_gaussian;
  if (name == "laplace") return Likelihood::laplace;
  if (name == "discretized_logistic") return Likelihood::discretized_logistic;
  if (name == "negative_binomial") return Likelihood::negative_binomial;
  UNIGEN_CHECK(name == "zero_inflated_negative_binomial", "unigen_fast: unknown likelihood ", name);
  return Likelihood::zero_inflated_negative_binomial;
}

// Gradients as an op returns them, in the order of its tensors; those whose bit of `wanted` is not set are empty.
template <int kCount>
class Gradients {
 public:
  Gradients(const Tensor& like, int64_t wanted) : like_(like), wanted_(wanted) {}

  // that of the next tensor; null: not wanted
  const Tensor* of(const Tensor* tensor) {
    const bool is_wanted = tensor && (wanted_ >> count_ & 1);
    Tensor& grad = grads_[count_++] = is_wanted ? empty_gradient(*tensor) : empty_absent(like_);
    return is_wanted ? &grad : nullptr;
  }

  auto all() const { return tuple_of(grads_); }

 private:
  const Tensor& like_;
  int64_t wanted_;
  int count_ = 0;
  std::array<Tensor, kCount> grads_;
};

inline const Tensor* present(const optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// The likelihood, and what the decoder gave, each with its gradient.
template <class Grads>
void describe_decoder(ObjectiveTensors& a, GridBuilder& event, Grads& grads, const Tensor& decoder,
                      const optional<Tensor>& decoder_2, const optional<Tensor>& decoder_3, const string& likelihood,
                      const vector<double>& bins, int64_t event_ndims) {
  a.dtype = dtype_of(decoder);
  a.likelihood.likelihood = likelihood_of(likelihood, decoder_2.has_value());
  if (bins.size() == 3) a.likelihood.bins = {bins[0], bins[1], bins[2]};
  const Tensor* outputs[kMaxDecoderOutputs] = {&decoder, present(decoder_2), present(decoder_3)};
  for (int k = 0; k < kMaxDecoderOutputs; ++k) {
    const Tensor* grad = grads.of(outputs[k]);
    if (!outputs[k]) continue;
    a.shared[k] = outputs[k]->dim() == event_ndims && decoder.dim() > event_ndims;
    for (const auto& [operand, tensor] : {std::pair{&a.decoder[k], outputs[k]}, {&a.grad_decoder[k], grad}}) {
      if (!tensor) continue;
      if (tensor == grad) event.result();
      if (a.shared[k]) event.of_event(*operand, *tensor);
      else event.element(*operand, *tensor);
    }
  }
}

// Two grids of the same rows: `rows` leading dimensions.
inline void check_rows(const Tensor& decoder, const Tensor& latent, int64_t rows) {
  bool same = rows <= latent.dim();
  for (int64_t d = 0; same && d < rows; ++d) same = decoder.size(d) == latent.size(d);
  UNIGEN_CHECK(same, "unigen_fast: the latent and what the decoder gave differ in their rows");
}

// The Gaussians of the latent, each with its gradient, by add(operand, tensor) to a builder.
template <class Grads, class Add>
void describe_gaussians(ObjectiveTensors& a, Grads& grads, GridBuilder& latent, const Tensor& mean, const Tensor& logvar,
                        const optional<Tensor>& prior_mean, const optional<Tensor>& prior_logvar, const Add& add) {
  const auto describe = [&](Operand& operand, Operand& grad_operand, const Tensor* tensor) {
    if (tensor) add(operand, *tensor);
    if (const Tensor* grad = grads.of(tensor)) {
      latent.result();
      add(grad_operand, *grad);
    }
  };
  a.latent_dtype = dtype_of(mean);
  describe(a.mean, a.grad_mean, &mean);
  describe(a.logvar, a.grad_logvar, &logvar);
  describe(a.prior_mean, a.grad_prior_mean, present(prior_mean));
  describe(a.prior_logvar, a.grad_prior_logvar, present(prior_logvar));
}

// The tensors and options of the evidence lower bound, as the ops take them.
struct ElboCall {
  const Tensor& decoder;
  const optional<Tensor>&decoder_2, &decoder_3;
  const Tensor &x, &mean, &logvar;
  const optional<Tensor>&prior_mean, &prior_logvar, &weights;
  int64_t event_ndims;
  const string& likelihood;
  const vector<double>& bins;
  double kl_weight, scale;
  const string& reduction;

  int64_t rows() const {
    UNIGEN_CHECK(0 <= event_ndims && event_ndims <= decoder.dim(), "unigen_fast: event_ndims out of range");
    return decoder.dim() - event_ndims;
  }

  // All of the arguments, those that only one of the two kernels has by own(a, builder of the event's grid).
  template <class Arguments, class Own>
  void describe(Arguments& a, Gradients<kElboGradients>& grads, const Own& own) const {
    check_rows(decoder, mean, rows());
    GridBuilder event(decoder, rows()), latent(mean, rows());
    own(a, event);
    if (weights) event.row(a.weights, *weights);
    event.element(a.x, x);
    describe_decoder(a, event, grads, decoder, decoder_2, decoder_3, likelihood, bins, event_ndims);
    describe_gaussians(a, grads, latent, mean, logvar, prior_mean, prior_logvar,
                       [&](Operand& operand, const Tensor& tensor) { latent.element(operand, tensor); });
    a.kl_weight = kl_weight;
    a.grid = event.finish_samples();
    a.latent = latent.finish_samples();
    a.reduction = reduction_of(reduction, a.grid.rows, scale);
  }
};

using ElboGradients = decltype(std::declval<Gradients<kElboGradients>>().all());
using ElboResult = decltype(std::tuple_cat(tuple<Tensor, Tensor, Tensor>(), ElboGradients()));

template <class Backend>
ElboResult elbo_loss(const Tensor& decoder, const optional<Tensor>& decoder_2, const optional<Tensor>& decoder_3,
                     const Tensor& x, const Tensor& mean, const Tensor& logvar, const optional<Tensor>& prior_mean,
                     const optional<Tensor>& prior_logvar, const optional<Tensor>& weights, int64_t event_ndims,
                     const string& likelihood, const vector<double>& bins, double kl_weight, double scale,
                     const string& reduction, int64_t gradients) {
  const ElboCall call = {decoder,      decoder_2, decoder_3,   x,          mean, logvar,    prior_mean, prior_logvar,
                         weights,      event_ndims, likelihood, bins,       kl_weight, scale, reduction};
  const auto dtype = arithmetic_type(decoder.scalar_type());
  Dims sizes(decoder.sizes());
  while (sizes.size() > call.rows()) sizes.pop_back();
  Tensor log_likelihood = empty_contiguous(decoder, sizes, dtype), kl = empty_contiguous(decoder, sizes, dtype);
  Tensor value = empty_contiguous(decoder, reduction == "none" ? sizes : Dims{}, dtype);
  ElboLoss a;
  Gradients<kElboGradients> grads(decoder, gradients);
  call.describe(a, grads, [&](ElboLoss& own, GridBuilder& event) {
    event.row(own.log_likelihood, log_likelihood);
    event.row(own.kl, kl);
    event.row(own.value, value);
  });
  a.gradients = gradients != 0;
  Backend::elbo_loss(a, decoder);
  return std::tuple_cat(std::make_tuple(value, log_likelihood, kl), grads.all());
}

template <class Backend>
ElboGradients elbo_loss_backward(const Tensor& grad_loss, const Tensor& grad_log_likelihood, const Tensor& grad_kl,
                                 const Tensor& decoder, const optional<Tensor>& decoder_2,
                                 const optional<Tensor>& decoder_3, const Tensor& x, const Tensor& mean,
                                 const Tensor& logvar, const optional<Tensor>& prior_mean,
                                 const optional<Tensor>& prior_logvar, const optional<Tensor>& weights,
                                 int64_t event_ndims, const string& likelihood, const vector<double>& bins,
                                 double kl_weight, double scale, const string& reduction, int64_t, int64_t needed) {
  const ElboCall call = {decoder,      decoder_2, decoder_3,   x,          mean, logvar,    prior_mean, prior_logvar,
                         weights,      event_ndims, likelihood, bins,       kl_weight, scale, reduction};
  ElboLossBackward a;
  Gradients<kElboGradients> grads(decoder, needed);
  call.describe(a, grads, [&](ElboLossBackward& own, GridBuilder& event) {
    event.row(own.grad_value, grad_loss);
    event.row(own.grad_log_likelihood, grad_log_likelihood);
    event.row(own.grad_kl, grad_kl);
  });
  Backend::elbo_loss_backward(a, decoder);
  return grads.all();
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

  int64_t rows() const {
    UNIGEN_CHECK(0 <= event_ndims && event_ndims <= decoder.dim(), "unigen_fast: event_ndims out of range");
    return decoder.dim() - event_ndims;
  }

  Dims row_sizes() const {
    Dims sizes;
    for (int64_t d = 0; d < rows(); ++d) sizes.push_back(decoder.size(d));
    return sizes;
  }

  // All of the arguments, those that only one of the two kernels has by own(a, builder of the event's grid).
  template <class Arguments, class Own>
  void describe(Arguments& a, Gradients<kBoundGradients>& grads, const Tensor& log_w, const Tensor& residual,
                const Own& own) const {
    check_rows(decoder, z, rows());
    GridBuilder event = GridBuilder::of_samples(decoder, rows(), dim), latent = GridBuilder::of_samples(z, rows(), dim);
    a.samples = decoder.size(dim);
    UNIGEN_CHECK(groups > 0 && a.samples % groups == 0, "unigen_fast: got ", groups, " groups of ", a.samples, " samples");
    a.groups = groups;
    a.power = power;
    a.elbo_weight = elbo_weight;
    a.reduction = reduction_of(reduction, event.examples(), scale);
    event.row(a.log_w, log_w);
    event.row(a.residual, residual);
    own(a, event);
    event.of_example(a.x, x);
    describe_decoder(a, event, grads, decoder, decoder_2, decoder_3, likelihood, bins, event_ndims);
    latent.element(a.z, z);
    if (const Tensor* grad = grads.of(&z)) latent.result().element(a.grad_z, *grad);
    describe_gaussians(a, grads, latent, mean, logvar, prior_mean, prior_logvar,
                       [&](Operand& operand, const Tensor& tensor) { latent.of_example(operand, tensor); });
    a.grid = event.finish_samples();
    a.latent = latent.finish_samples();
  }
};

using BoundGradients = decltype(std::declval<Gradients<kBoundGradients>>().all());
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
  Gradients<kBoundGradients> grads(decoder, gradients);
  call.describe(a, grads, log_w, residual, [&](SampledBound& own, GridBuilder& event) {
    event.row_of_example(own.bound, bound);
    event.row_of_example(own.ess, ess);
    if (!own.reduction.reduce) event.row_of_example(own.value, value);
    own.value.data = value.data_ptr();
  });
  a.gradients = gradients != 0;
  Backend::sampled_bound(a, decoder);
  return std::tuple_cat(std::make_tuple(value, log_w, bound, ess, residual), grads.all());
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
  Gradients<kBoundGradients> grads(decoder, needed);
  call.describe(a, grads, log_w, residual, [&](SampledBoundBackward& own, GridBuilder& event) {
    event.row(own.grad_log_w, grad_log_w);
    event.row_of_example(own.grad_value, grad_loss);
  });
  Backend::sampled_bound_backward(a, decoder);
  return grads.all();
}

#define UNIGEN_OBJECTIVES_OPS(X) \
  X(elbo_loss)                   \
  X(elbo_loss_backward)          \
  X(multi_sample_bound)          \
  X(multi_sample_bound_backward)

}  // namespace unigen
