// The ops of unigen_fast/_ops.py: allocate, describe, launch. The same code for every device; a Backend has one static
// function for each of UNIGEN_KERNELS, which runs the kernel on the device of the tensor it is given.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../formulas/adversarial.h"
#include "grid_builder.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace unigen {

using std::optional;
using std::string;
using std::tuple;
using std::vector;

// ---- allocation ----------------------------------------------------------------------------------------------------

inline Tensor empty_strided(const Tensor& like, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(const Tensor& like, const Dims& sizes, ScalarType dtype) {
  int64_t strides[kMaxTensorDims], stride = 1;
  for (int64_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(like, sizes.size(), sizes.data(), strides, dtype);
}

inline Tensor empty_absent(const Tensor& like) { return empty_contiguous(like, {0}, like.scalar_type()); }

// torch.empty_like, without the dispatcher where the tensor is contiguous, or a piece of one that is
inline Tensor empty_gradient(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t ndim = int64_t(sizes.size());
  if (tensor.is_contiguous()) return empty_strided(tensor, ndim, sizes.data(), strides.data(), tensor.scalar_type());
  bool nested = true;  // each dimension beyond the next one
  for (int64_t d = 0; d < ndim; ++d)
    nested = nested && sizes[d] > 1 && strides[d] >= (d + 1 < ndim ? strides[d + 1] * sizes[d + 1] : 1);
  return nested ? empty_contiguous(tensor, Dims(sizes), tensor.scalar_type()) : torch::stable::empty_like(tensor);
}

// ---- options -------------------------------------------------------------------------------------------------------

// `rows` is what a mean divides by.
inline Reduction reduction_of(const string& name, int64_t rows, double scale = 1) {
  STD_TORCH_CHECK(name == "mean" || name == "sum" || name == "none", "unigen_fast: unknown reduction ", name);
  return {name != "none", scale, name == "mean" ? double(rows) : 1.0};
}

inline Spread spread_of(const string& name) {
  if (name == "std") return Spread::std;
  if (name == "logstd") return Spread::logstd;
  STD_TORCH_CHECK(name == "logvar", "unigen_fast: unknown spread ", name);
  return Spread::logvar;
}

// a row value or, if reduced, one number
inline Tensor empty_value(const Tensor& like, const GridBuilder& builder, const string& reduction) {
  const auto dtype = arithmetic_type(like.scalar_type());
  return empty_contiguous(like, reduction == "none" ? builder.row_sizes() : Dims{}, dtype);
}

// ---- importance ----------------------------------------------------------------------------------------------------

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

// ---- adversarial ---------------------------------------------------------------------------------------------------

template <class Backend>
tuple<Tensor, Tensor> importance_weighted_generator_loss(const Tensor& fake, optional<int64_t> dim, double temperature, bool,
                                                         const string& reduction) {
  return weight_rows<Backend>(fake, dim, RowValue::iwgan, temperature, reduction);
}

template <class Backend>
Tensor importance_weighted_generator_loss_backward(const Tensor& grad, const Tensor& fake, const Tensor& statistics,
                                                   optional<int64_t> dim, double temperature, bool detach,
                                                   const string& reduction) {
  return weight_rows_backward<Backend>(grad, fake, statistics, dim, RowValue::iwgan, temperature, detach, reduction);
}

inline void check_term(int64_t term) { STD_TORCH_CHECK(0 <= term && term < kTerms, "unigen_fast: unknown term ", term); }

// The first `reals` tensors have real_term, the others fake_term.
struct LogitItems {
  LogitItems(const vector<Tensor>& logits, int64_t reals, int64_t real_term, int64_t fake_term, const string& reduction,
             const vector<Tensor>* grads = nullptr)
      : items(logits.size()) {
    STD_TORCH_CHECK(!logits.empty(), "unigen_fast: expected at least one tensor of logits");
    check_term(real_term);
    check_term(fake_term);
    const auto dtype = logits[0].scalar_type();
    for (size_t i = 0; i < logits.size(); ++i) {
      STD_TORCH_CHECK(logits[i].scalar_type() == dtype, "unigen_fast: expected logits of one dtype");
      LogitItem& item = items[i];
      auto builder = GridBuilder::over(logits[i], std::nullopt);
      item.dtype = dtype_of(logits[i]);
      item.term = int(int64_t(i) < reals ? real_term : fake_term);
      item.count = reduction == "mean" ? double(logits[i].numel()) : 1.0;
      builder.element(item.logits, logits[i]);
      if (grads) builder.element(item.grad_logits, (*grads)[i]);
      item.grid = builder.finish();
    }
  }

  template <class Arguments>
  void describe(Arguments& a, double scale) const {
    a.items = items.data();
    a.num_items = int64_t(items.size());
    a.dtype = items[0].dtype;
    a.scale = scale;
  }

  vector<LogitItem> items;
};

template <class Backend>
tuple<Tensor, Tensor> logit_loss(const vector<Tensor>& logits, int64_t reals, int64_t real_term, int64_t fake_term,
                                 const string& reduction, double scale, bool return_stats) {
  const LogitItems items(logits, reals, real_term, fake_term, reduction);
  const auto dtype = arithmetic_type(logits[0].scalar_type());
  Tensor value = empty_contiguous(logits[0], {}, dtype);
  Tensor statistics = empty_contiguous(logits[0], {return_stats ? int64_t(logits.size()) : 0, 4}, dtype);
  LogitLoss a;
  items.describe(a, scale);
  a.value = value.data_ptr();
  a.statistics = return_stats ? statistics.data_ptr() : nullptr;
  Backend::logit_loss(a, logits[0]);
  return {value, statistics};
}

template <class Backend>
vector<Tensor> logit_loss_backward(const Tensor& grad, const vector<Tensor>& logits, int64_t reals, int64_t real_term,
                                   int64_t fake_term, const string& reduction, double scale, bool) {
  vector<Tensor> grads;
  grads.reserve(logits.size());
  for (const Tensor& tensor : logits) grads.push_back(empty_gradient(tensor));
  const LogitItems items(logits, reals, real_term, fake_term, reduction, &grads);
  STD_TORCH_CHECK(grad.scalar_type() == arithmetic_type(logits[0].scalar_type()), "unigen_fast: grad has the wrong dtype");
  LogitLossBackward a;
  items.describe(a, scale);
  a.grad = grad.data_ptr();
  Backend::logit_loss_backward(a, logits[0]);
  return grads;
}

template <class Backend>
Tensor logit_term(const Tensor& logits, int64_t term, double scale) {
  check_term(term);
  auto builder = GridBuilder::over(logits, std::nullopt);
  Tensor out = empty_contiguous(logits, Dims(logits.sizes()), arithmetic_type(logits.scalar_type()));
  LogitTerm a;
  a.dtype = dtype_of(logits);
  a.term = int(term);
  a.scale = scale;
  builder.element(a.logits, logits);
  builder.element(a.out, out, out.scalar_type());
  a.grid = builder.finish();
  Backend::logit_term(a, logits);
  return out;
}

template <class Backend>
Tensor logit_term_backward(const Tensor& grad, const Tensor& logits, int64_t term, double scale) {
  check_term(term);
  auto builder = GridBuilder::over(logits, std::nullopt);
  Tensor grad_logits = empty_gradient(logits);
  LogitTermBackward a;
  a.dtype = dtype_of(logits);
  a.term = int(term);
  a.scale = scale;
  builder.element(a.grad, grad, arithmetic_type(logits.scalar_type()));
  builder.element(a.logits, logits);
  builder.element(a.grad_logits, grad_logits);
  a.grid = builder.finish();
  Backend::logit_term_backward(a, logits);
  return grad_logits;
}

// ---- divergence ----------------------------------------------------------------------------------------------------

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
    builder.element(operand, result);
    return result;
  };
  Tensor grad_mean = gradient(0, a.grad_mean, mean), grad_spread = gradient(1, a.grad_spread, logvar);
  Tensor grad_prior_mean = gradient(2, a.grad_prior_mean, prior_mean);
  Tensor grad_prior_spread = gradient(3, a.grad_prior_spread, prior_logvar);
  a.grid = builder.finish();
  Backend::gaussian_kl_backward(a, mean);
  return {grad_mean, grad_spread, grad_prior_mean, grad_prior_spread};
}

// samples, and how many elements of `mean` follow the sample dimension
template <class Arguments>
void set_samples(Arguments& a, const Tensor& mean, int64_t num_samples, int64_t sample_dim) {
  a.samples = num_samples < 0 ? 1 : num_samples;
  a.inner = 1;
  for (int64_t d = num_samples < 0 ? 0 : sample_dim; d < mean.dim(); ++d) a.inner *= mean.size(d);
}

template <class Backend>
Tensor sample(const Tensor& mean, const Tensor& logvar, const Tensor& rng_state, int64_t num_samples, int64_t sample_dim,
              int64_t event_ndims, const string& spread, double clamp_min, double clamp_max, bool with_kl, Tensor& kl) {
  GridBuilder builder(mean, mean.dim() - event_ndims);
  Dims sizes(mean.sizes());
  if (num_samples >= 0) sizes.insert(sample_dim, num_samples);
  Tensor z = empty_contiguous(mean, sizes, mean.scalar_type());
  SampleGaussian a;
  a.dtype = dtype_of(mean);
  a.options = {spread_of(spread), clamp_min, clamp_max};
  a.rng_state = static_cast<const int64_t*>(rng_state.data_ptr());
  a.z = z.data_ptr();
  set_samples(a, mean, num_samples, sample_dim);
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
  a.rng_state = static_cast<const int64_t*>(rng_state.data_ptr());
  set_samples(a, mean, num_samples, sample_dim);
  if (num_samples < 0) {
    builder.element(a.grad_z, grad_z);
  } else {
    builder.element_without(a.grad_z, grad_z, sample_dim);
    a.grad_z_sample_stride = grad_z.stride(sample_dim);
  }
  builder.element(a.mean, mean);
  builder.element(a.spread, logvar);
  if (grad_kl) builder.row(a.grad_kl, *grad_kl);
  Tensor grad_mean = needed & 1 ? empty_gradient(mean) : empty_absent(mean);
  Tensor grad_spread = needed & 2 ? empty_gradient(logvar) : empty_absent(mean);
  if (needed & 1) builder.element(a.grad_mean, grad_mean);
  if (needed & 2) builder.element(a.grad_spread, grad_spread);
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

// ---- likelihood ----------------------------------------------------------------------------------------------------

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

// ---- registration --------------------------------------------------------------------------------------------------

// Every op: X(name); each has a function template of its name above.
#define UNIGEN_OPS(X)                           \
  X(log_mean_exp)                               \
  X(log_mean_exp_backward)                      \
  X(importance_weights)                         \
  X(importance_weights_backward)                \
  X(effective_sample_size)                      \
  X(iwae_loss)                                  \
  X(iwae_loss_backward)                         \
  X(importance_weighted_generator_loss)         \
  X(importance_weighted_generator_loss_backward) \
  X(logit_loss)                                 \
  X(logit_loss_backward)                        \
  X(logit_term)                                 \
  X(logit_term_backward)                        \
  X(gaussian_kl)                                \
  X(gaussian_kl_backward)                       \
  X(sample_gaussian)                            \
  X(sample_gaussian_backward)                   \
  X(sample_gaussian_with_kl)                    \
  X(sample_gaussian_with_kl_backward)           \
  X(bernoulli_log_prob)                         \
  X(bernoulli_log_prob_backward)

}  // namespace unigen
