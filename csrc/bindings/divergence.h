// The ops of unigen_fast/divergence.py.
#pragma once

#include "likelihood.h"

namespace unigen {

template <class Arguments>
void set_floors(Arguments& a, double free_bits, const string& mode) {
  if (free_bits > 0) (mode == "per_dim" ? a.dim_floor : a.row_floor) = free_bits;
}

template <class Backend>
tuple<Tensor, Tensor> gaussian_kl(const Tensor& mean, const Tensor& logvar, const optional<Tensor>& prior_mean,
                                  const optional<Tensor>& prior_logvar, const optional<Tensor>& weights, int64_t event_ndims,
                                  const string& spread, double free_bits, const string& free_bits_mode, double clamp_min,
                                  double clamp_max, double scale, const string& reduction) {
  GridBuilder builder(mean, mean.dim() - event_ndims);
  const auto dtype = arithmetic_type(mean.scalar_type());
  GaussianKl a;
  a.dtype = dtype_of(mean);
  a.options = {spread_of(spread), clamp_min, clamp_max};
  a.reduction = reduction_of(reduction, builder.row_sizes().product(), scale);
  set_floors(a, free_bits, free_bits_mode);
  const bool keep_rows = weights.has_value() || a.row_floor > -HUGE_VAL;
  Tensor value = empty_value(mean, builder, reduction);
  Tensor rows = empty_contiguous(mean, keep_rows ? builder.row_sizes() : Dims{0}, dtype);
  builder.element(a.mean, mean);
  builder.element(a.spread, logvar);
  if (prior_mean) builder.element(a.prior_mean, *prior_mean);
  if (prior_logvar) builder.element(a.prior_spread, *prior_logvar);
  if (weights) builder.row(a.weights, *weights);
  if (keep_rows) builder.row(a.rows, rows);
  builder.row(a.value, value);
  a.grid = builder.finish();
  Backend::gaussian_kl(a, mean);
  return {value, rows};
}

template <class Backend>
tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward(const Tensor& grad, const Tensor& mean, const Tensor& logvar,
                                                           const optional<Tensor>& prior_mean,
                                                           const optional<Tensor>& prior_logvar,
                                                           const optional<Tensor>& weights, const Tensor& rows,
                                                           int64_t event_ndims, const string& spread, double free_bits,
                                                           const string& free_bits_mode, double clamp_min, double clamp_max,
                                                           double scale, const string& reduction, int64_t needed) {
  GridBuilder builder(mean, mean.dim() - event_ndims);
  GaussianKlBackward a;
  a.dtype = dtype_of(mean);
  a.options = {spread_of(spread), clamp_min, clamp_max};
  a.reduction = reduction_of(reduction, builder.row_sizes().product(), scale);
  set_floors(a, free_bits, free_bits_mode);
  builder.row(a.grad, grad);
  builder.element(a.mean, mean);
  builder.element(a.spread, logvar);
  if (prior_mean) builder.element(a.prior_mean, *prior_mean);
  if (prior_logvar) builder.element(a.prior_spread, *prior_logvar);
  if (weights) builder.row(a.weights, *weights);
  if (a.row_floor > -HUGE_VAL) builder.row(a.rows, rows);

  const auto gradient = [&](int bit, Operand& operand, const optional<Tensor>& tensor) {
    if (!(needed >> bit & 1) || !tensor) return empty_absent(mean);
    Tensor result = empty_gradient(*tensor);
    builder.result().element(operand, result);
    return result;
  };
  Tensor grad_mean = gradient(0, a.grad_mean, mean), grad_spread = gradient(1, a.grad_spread, logvar);
  Tensor grad_prior_mean = gradient(2, a.grad_prior_mean, prior_mean);
  Tensor grad_prior_spread = gradient(3, a.grad_prior_spread, prior_logvar);
  a.grid = builder.finish();
  Backend::gaussian_kl_backward(a, mean);
  return {grad_mean, grad_spread, grad_prior_mean, grad_prior_spread};
}

inline const int64_t* random_state(const Tensor& state, const Tensor& like) {
  UNIGEN_CHECK(state.scalar_type() == ScalarType::Long && state.dim() == 1 && state.size(0) == 2 && state.is_contiguous() &&
                      state.device() == like.device(),
                  "unigen_fast: expected a generator's state of two int64 on the device of the tensors");
  return static_cast<const int64_t*>(state.data_ptr());
}

// samples, and how many elements of `mean` follow the sample dimension
template <class Arguments>
void set_samples(Arguments& a, const Tensor& mean, int64_t num_samples, int64_t sample_dim) {
  UNIGEN_CHECK(num_samples < 0 || (0 <= sample_dim && sample_dim <= mean.dim()), "unigen_fast: sample_dim out of range");
  a.samples = num_samples < 0 ? 1 : num_samples;
  a.inner = 1;
  for (int64_t d = num_samples < 0 ? 0 : sample_dim; d < mean.dim(); ++d) a.inner *= mean.size(d);
}

template <class Backend>
Tensor sample(const Tensor& mean, const Tensor& logvar, const Tensor& rng_state, int64_t num_samples, int64_t sample_dim,
              int64_t event_ndims, const string& spread, double clamp_min, double clamp_max, bool with_kl, Tensor& kl) {
  GridBuilder builder(mean, mean.dim() - event_ndims);
  Dims sizes(mean.sizes());
  SampleGaussian a;
  set_samples(a, mean, num_samples, sample_dim);
  if (num_samples >= 0) sizes.insert(sample_dim, num_samples);
  Tensor z = empty_contiguous(mean, sizes, mean.scalar_type());
  a.dtype = dtype_of(mean);
  a.options = {spread_of(spread), clamp_min, clamp_max};
  a.rng_state = random_state(rng_state, mean);
  a.z = z.data_ptr();
  builder.element(a.mean, mean);
  builder.element(a.spread, logvar);
  if (with_kl) {
    kl = empty_value(mean, builder, "none");
    builder.row(a.kl, kl);
  }
  a.grid = builder.finish(false);
  Backend::sample_gaussian(a, mean);
  return z;
}

template <class Backend>
tuple<Tensor, Tensor> sample_backward(const Tensor& grad_z, const optional<Tensor>& grad_kl, const Tensor& mean,
                                      const Tensor& logvar, const Tensor& rng_state, int64_t num_samples, int64_t sample_dim,
                                      int64_t event_ndims, const string& spread, double clamp_min, double clamp_max,
                                      int64_t needed) {
  GridBuilder builder(mean, mean.dim() - event_ndims);
  SampleGaussianBackward a;
  a.dtype = dtype_of(mean);
  a.options = {spread_of(spread), clamp_min, clamp_max};
  a.rng_state = random_state(rng_state, mean);
  set_samples(a, mean, num_samples, sample_dim);
  if (num_samples < 0) {
    builder.element(a.grad_z, grad_z);
  } else {
    builder.element_without(a.grad_z, grad_z, sample_dim, a.grad_z_sample_stride);
    UNIGEN_CHECK(grad_z.size(sample_dim) == num_samples, "unigen_fast: got a gradient of ", grad_z.size(sample_dim),
                    " samples, expected ", num_samples);
  }
  builder.element(a.mean, mean);
  builder.element(a.spread, logvar);
  if (grad_kl) builder.row(a.grad_kl, *grad_kl);
  Tensor grad_mean = needed & 1 ? empty_gradient(mean) : empty_absent(mean);
  Tensor grad_spread = needed & 2 ? empty_gradient(logvar) : empty_absent(mean);
  if (needed & 1) builder.result().element(a.grad_mean, grad_mean);
  if (needed & 2) builder.result().element(a.grad_spread, grad_spread);
  a.grid = builder.finish(false);
  Backend::sample_gaussian_backward(a, mean);
  return {grad_mean, grad_spread};
}

// Without a KL any split into rows will do: the last dimension is the columns.
inline int64_t sample_event_ndims(const Tensor& mean) { return std::min<int64_t>(mean.dim(), 1); }

template <class Backend>
Tensor sample_gaussian(const Tensor& mean, const Tensor& logvar, const Tensor& rng_state, int64_t num_samples,
                       int64_t sample_dim, const string& spread, double clamp_min, double clamp_max) {
  Tensor kl;
  return sample<Backend>(mean, logvar, rng_state, num_samples, sample_dim, sample_event_ndims(mean), spread, clamp_min,
                         clamp_max, false, kl);
}

template <class Backend>
tuple<Tensor, Tensor> sample_gaussian_backward(const Tensor& grad, const Tensor& mean, const Tensor& logvar,
                                               const Tensor& rng_state, int64_t num_samples, int64_t sample_dim,
                                               const string& spread, double clamp_min, double clamp_max, int64_t needed) {
  return sample_backward<Backend>(grad, std::nullopt, mean, logvar, rng_state, num_samples, sample_dim,
                                  sample_event_ndims(mean), spread, clamp_min, clamp_max, needed);
}

template <class Backend>
tuple<Tensor, Tensor> sample_gaussian_with_kl(const Tensor& mean, const Tensor& logvar, const Tensor& rng_state,
                                              int64_t num_samples, int64_t sample_dim, int64_t event_ndims,
                                              const string& spread, double clamp_min, double clamp_max) {
  Tensor kl;
  Tensor z = sample<Backend>(mean, logvar, rng_state, num_samples, sample_dim, event_ndims, spread, clamp_min, clamp_max,
                             true, kl);
  return {z, kl};
}

template <class Backend>
tuple<Tensor, Tensor> sample_gaussian_with_kl_backward(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& mean,
                                                       const Tensor& logvar, const Tensor& rng_state, int64_t num_samples,
                                                       int64_t sample_dim, int64_t event_ndims, const string& spread,
                                                       double clamp_min, double clamp_max, int64_t needed) {
  return sample_backward<Backend>(grad_z, grad_kl, mean, logvar, rng_state, num_samples, sample_dim, event_ndims, spread,
                                  clamp_min, clamp_max, needed);
}

// ---- formulas --------------------------------------------------------------------------------------------------------

inline FormulaCall monte_carlo_kl(bool has_mean, int64_t event_ndims, const string& spread, double clamp_min,
                                  double clamp_max, double scale, const string& reduction) {
  const Formula formula = has_mean ? Formula::gaussian_kl_monte_carlo : Formula::gaussian_kl_entropy;
  return {{formula, {spread_of(spread), clamp_min, clamp_max}}, event_ndims, scale, reduction};
}

template <class Backend>
Tensor gaussian_kl_monte_carlo(const Tensor& z, const optional<Tensor>& mean, const Tensor& logvar,
                               const Tensor& prior_mean, const Tensor& prior_logvar, const optional<Tensor>& weights,
                               int64_t event_ndims, const string& spread, double clamp_min, double clamp_max, double scale,
                               const string& reduction) {
  const FormulaCall call =
      monte_carlo_kl(mean.has_value(), event_ndims, spread, clamp_min, clamp_max, scale, reduction);
  if (mean) return run_formula<Backend>(call, {&z, &*mean, &logvar, &prior_mean, &prior_logvar}, weights);
  return run_formula<Backend>(call, {&z, &logvar, &prior_mean, &prior_logvar}, weights);
}
template <class Backend>
tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_kl_monte_carlo_backward(
    const Tensor& grad, const Tensor& z, const optional<Tensor>& mean, const Tensor& logvar, const Tensor& prior_mean,
    const Tensor& prior_logvar, const optional<Tensor>& weights, int64_t event_ndims, const string& spread,
    double clamp_min, double clamp_max, double scale, const string& reduction, int64_t needed) {
  const FormulaCall call =
      monte_carlo_kl(mean.has_value(), event_ndims, spread, clamp_min, clamp_max, scale, reduction);
  if (mean) {
    return tuple_of(
        run_formula_backward<5, Backend>(call, grad, {&z, &*mean, &logvar, &prior_mean, &prior_logvar}, needed, weights));
  }
  const int64_t without_mean = (needed & 1) | (needed >> 2) << 1;
  const auto grads =
      run_formula_backward<4, Backend>(call, grad, {&z, &logvar, &prior_mean, &prior_logvar}, without_mean, weights);
  return {grads[0], empty_absent(z), grads[1], grads[2], grads[3]};
}

template <class Backend>
Tensor bernoulli_kl(const Tensor& logits_q, const optional<Tensor>& logits_p, const optional<Tensor>& weights,
                    int64_t event_ndims, double scale, const string& reduction) {
  if (logits_p) {
    return run_formula<Backend>({{Formula::bernoulli_kl}, event_ndims, scale, reduction}, {&logits_q, &*logits_p}, weights);
  }
  return run_formula<Backend>({{Formula::bernoulli_kl_half}, event_ndims, scale, reduction}, {&logits_q}, weights);
}
template <class Backend>
tuple<Tensor, Tensor> bernoulli_kl_backward(const Tensor& grad, const Tensor& logits_q, const optional<Tensor>& logits_p,
                                            const optional<Tensor>& weights, int64_t event_ndims, double scale,
                                            const string& reduction, int64_t needed) {
  if (logits_p) {
    const FormulaCall call = {{Formula::bernoulli_kl}, event_ndims, scale, reduction};
    return tuple_of(run_formula_backward<2, Backend>(call, grad, {&logits_q, &*logits_p}, needed, weights));
  }
  const FormulaCall call = {{Formula::bernoulli_kl_half}, event_ndims, scale, reduction};
  return {run_formula_backward<1, Backend>(call, grad, {&logits_q}, needed, weights)[0], empty_absent(logits_q)};
}

#define UNIGEN_DIVERGENCE_OPS(X)      \
  X(gaussian_kl)                      \
  X(gaussian_kl_backward)             \
  X(sample_gaussian)                  \
  X(sample_gaussian_backward)         \
  X(sample_gaussian_with_kl)          \
  X(sample_gaussian_with_kl_backward) \
  X(gaussian_kl_monte_carlo)          \
  X(gaussian_kl_monte_carlo_backward) \
  X(bernoulli_kl)                     \
  X(bernoulli_kl_backward)

}  // namespace unigen
