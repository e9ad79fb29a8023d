// The ops of unigen_fast/adversarial.py.
#pragma once

#include "../kernels/adversarial.h"
#include "importance.h"

namespace unigen {

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

inline void check_term(int64_t term) { UNIGEN_CHECK(0 <= term && term < kTerms, "unigen_fast: unknown term ", term); }

// The first `reals` tensors have real_term, the others fake_term.
struct LogitItems {
  LogitItems(const vector<Tensor>& logits, int64_t reals, int64_t real_term, int64_t fake_term, const string& reduction,
             const vector<Tensor>* grads = nullptr)
      : items(logits.size()) {
    UNIGEN_CHECK(!logits.empty(), "unigen_fast: expected at least one tensor of logits");
    check_term(real_term);
    check_term(fake_term);
    const auto dtype = logits[0].scalar_type();
    const bool mean = reduction == "mean";
    for (size_t i = 0; i < logits.size(); ++i) {
      const Tensor& tensor = logits[i];
      UNIGEN_CHECK(tensor.scalar_type() == dtype && tensor.device() == logits[0].device(),
                      "unigen_fast: expected logits of one dtype on one device");
      LogitItem& item = items[i];
      if (tensor.is_contiguous()) {  // most often; then so is its gradient
        item.grid = GridBuilder::flat(tensor.numel());
        item.logits = GridBuilder::flat(tensor.data_ptr());
        if (grads) item.grad_logits = GridBuilder::flat((*grads)[i].data_ptr());
      } else {
        auto builder = GridBuilder::over(tensor, std::nullopt);
        builder.element(item.logits, tensor);
        if (grads) builder.result().element(item.grad_logits, (*grads)[i]);
        item.grid = builder.finish();
      }
      item.dtype = dtype_of(tensor);
      item.term = int(int64_t(i) < reals ? real_term : fake_term);
      item.count = mean ? double(item.grid.rows * item.grid.cols) : 1.0;
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
  check_number(grad, logits[0]);
  LogitLossBackward a;
  items.describe(a, scale);
  a.grad = grad.data_ptr();
  Backend::logit_loss_backward(a, logits[0]);
  return grads;
}

inline int coupling_named(const string& name) {
  UNIGEN_CHECK(name == "averages" || name == "ratios", "unigen_fast: unknown coupling ", name);
  return int(name == "averages" ? Coupling::averages : Coupling::ratios);
}

inline void check_reals(const vector<Tensor>& logits, int64_t reals, int coupling) {
  const bool paired = Coupling(coupling) != Coupling::averages || 2 * reals == int64_t(logits.size());
  UNIGEN_CHECK(0 <= reals && reals <= int64_t(logits.size()) && paired, "unigen_fast: expected as many real as fake tensors");
}

template <class Backend>
tuple<Tensor, Tensor> coupled_logit_loss(const vector<Tensor>& logits, int64_t reals, const string& coupling,
                                         int64_t real_term, int64_t fake_term, const string& reduction, double scale,
                                         bool return_stats) {
  const LogitItems items(logits, reals, real_term, fake_term, reduction);
  const auto dtype = arithmetic_type(logits[0].scalar_type());
  Tensor value = empty_contiguous(logits[0], {}, dtype);
  Tensor statistics = empty_contiguous(logits[0], {int64_t(logits.size()), kCoupledColumns}, dtype);
  CoupledLogitLoss a;
  items.describe(a, scale);
  a.reals = reals;
  a.coupling = coupling_named(coupling);
  a.return_stats = return_stats;
  a.value = value.data_ptr();
  a.statistics = statistics.data_ptr();
  check_reals(logits, reals, a.coupling);
  Backend::coupled_logit_loss(a, logits[0]);
  return {value, statistics};
}

template <class Backend>
vector<Tensor> coupled_logit_loss_backward(const Tensor& grad, const vector<Tensor>& logits, const Tensor& statistics,
                                           int64_t reals, const string& coupling, int64_t real_term, int64_t fake_term,
                                           const string& reduction, double scale, bool) {
  vector<Tensor> grads;
  grads.reserve(logits.size());
  for (const Tensor& tensor : logits) grads.push_back(empty_gradient(tensor));
  const LogitItems items(logits, reals, real_term, fake_term, reduction, &grads);
  check_number(grad, logits[0]);
  check_buffer(statistics, logits[0], int64_t(logits.size()) * kCoupledColumns);
  CoupledLogitLossBackward a;
  items.describe(a, scale);
  a.reals = reals;
  a.coupling = coupling_named(coupling);
  a.grad = grad.data_ptr();
  a.statistics = statistics.data_ptr();
  check_reals(logits, reals, a.coupling);
  Backend::coupled_logit_loss_backward(a, logits[0]);
  return grads;
}

inline void check_groups(const Tensor& fake, const Tensor& groups) {
  UNIGEN_CHECK(fake.dim() == 1 && groups.dim() == 1, "unigen_fast: expected logits and labels of one dimension");
}

template <class Backend>
tuple<Tensor, Tensor> grouped_importance_weighted_generator_loss(const Tensor& fake, const Tensor& groups,
                                                                 double temperature, bool, const string& reduction) {
  check_groups(fake, groups);
  const auto dtype = arithmetic_type(fake.scalar_type());
  const int64_t n = fake.numel();
  Tensor value = empty_contiguous(fake, {}, dtype);
  Tensor statistics = empty_contiguous(fake, {2 * n + 1}, dtype);
  const Tensor workspace = empty_contiguous(fake, {kGroupedBytes * (n + 1)}, ScalarType::Byte);
  auto builder = GridBuilder::over(fake, std::nullopt);
  GroupedWeights a;
  a.dtype = dtype_of(fake);
  builder.element(a.logits, fake);
  builder.element(a.labels, groups, ScalarType::Long);
  a.grid = builder.finish();
  a.temperature = temperature;
  a.mean = reduction == "mean";
  a.value = value.data_ptr();
  a.statistics = statistics.data_ptr();
  a.workspace = workspace.data_ptr();
  Backend::grouped_weights(a, fake);
  return {value, statistics};
}

template <class Backend>
Tensor grouped_importance_weighted_generator_loss_backward(const Tensor& grad, const Tensor& fake, const Tensor& groups,
                                                           const Tensor& statistics, double temperature, bool detach,
                                                           const string&) {
  check_groups(fake, groups);
  const auto dtype = arithmetic_type(fake.scalar_type());
  const int64_t n = fake.numel();
  check_number(grad, fake);
  check_buffer(statistics, fake, 2 * n + 1);
  Tensor grad_fake = empty_gradient(fake);
  auto builder = GridBuilder::over(fake, std::nullopt);
  GroupedWeightsBackward a;
  a.dtype = dtype_of(fake);
  builder.element(a.logits, fake);
  builder.result().element(a.grad_logits, grad_fake);
  builder.contiguous_columns(a.weights);
  builder.contiguous_columns(a.losses);
  a.grid = builder.finish();
  const int64_t item = dtype == ScalarType::Double ? 8 : 4;
  char* planes = static_cast<char*>(statistics.data_ptr());
  a.weights.data = planes;
  a.losses.data = planes + n * item;
  a.factor = planes + 2 * n * item;
  a.grad = grad.data_ptr();
  a.temperature = temperature;
  a.detach = detach;
  Backend::grouped_weights_backward(a, fake);
  return grad_fake;
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
  builder.result().element(a.grad_logits, grad_logits);
  a.grid = builder.finish();
  Backend::logit_term_backward(a, logits);
  return grad_logits;
}

#define UNIGEN_ADVERSARIAL_OPS(X)                        \
  X(importance_weighted_generator_loss)                  \
  X(importance_weighted_generator_loss_backward)         \
  X(grouped_importance_weighted_generator_loss)          \
  X(grouped_importance_weighted_generator_loss_backward) \
  X(logit_loss)                                          \
  X(logit_loss_backward)                                 \
  X(coupled_logit_loss)                                  \
  X(coupled_logit_loss_backward)                         \
  X(logit_term)                                          \
  X(logit_term_backward)

}  // namespace unigen
