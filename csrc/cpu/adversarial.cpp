// Kernels of discriminator logits: sums of an elementwise term, the term itself, and gradients.
#include "../formulas/adversarial.h"

#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// The term is a run-time choice: a branch per vector, always the same one, is cheaper than six copies of every loop.

struct Value {
  static constexpr int kOthers = 0;
  Term term;

  template <class V>
  UNIGEN_INLINE V operator()(V x, V*) const {
    return term_value(term, x);
  }
};

// others: on the right side of 0, logit, probability
struct ValueAndStatistics {
  static constexpr int kOthers = 3;
  Term term;

  template <class V>
  UNIGEN_INLINE V operator()(V x, V* others) const {
    const V zero = constant<V>(0), one = constant<V>(1);
    others[0] = select(wants_positive(term) ? zero < x : x < zero, one, zero);
    others[1] = x;
    others[2] = Logistic<V>(x).sigmoid();
    return term_value(term, x);
  }
};

template <class T>
void logit_loss_in(const LogitLoss& a, const Parallel& parallel) {
  double total = 0;
  for (int64_t i = 0; i < a.num_items; ++i) {
    const LogitItem& item = a.items[i];
    const Array in = {item.logits, a.dtype};
    const Term term = Term(item.term);
    double others[3];
    if (!a.statistics) {
      total += flat_sum<T>(item.grid, in, parallel, Value{term}, others) / item.count;
      continue;
    }
    const double sum = flat_sum<T>(item.grid, in, parallel, ValueAndStatistics{term}, others);
    total += sum / item.count;
    const double numel = double(item.grid.rows * item.grid.cols);
    T* statistics = static_cast<T*>(a.statistics) + 4 * i;
    statistics[0] = T(sum / numel);
    for (int k = 0; k < 3; ++k) statistics[k + 1] = T(others[k] / numel);
  }
  *static_cast<T*>(a.value) = T(a.scale * total);
}

template <class T>
struct ScaledSlope {
  static constexpr int kKept = 0;
  Term term;
  T factor;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = term_slope(term, in[0]) * Vec<T>(factor);
  }
};

template <class T>
void logit_loss_backward_in(const LogitLossBackward& a, const Parallel& parallel) {
  for (int64_t i = 0; i < a.num_items; ++i) {
    const LogitItem& item = a.items[i];
    const Array in = {item.logits, a.dtype}, out = {item.grad_logits, a.dtype};
    if (!item.grad_logits.data) continue;
    const T factor = *static_cast<const T*>(a.grad) * T(a.scale / item.count);
    Map<T, 0, 1, 1>(item.grid, nullptr, &in, &out).run(parallel, ScaledSlope<T>{Term(item.term), factor});
  }
}

template <class T>
struct ScaledTerm {
  static constexpr int kKept = 0;
  Term term;
  T scale;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = term_value(term, in[0]) * Vec<T>(scale);
  }
};

template <class T>
void logit_term_in(const LogitTerm& a, const Parallel& parallel) {
  const Array in = elements(a.logits, a), out = arithmetic(a.out, a);
  Map<T, 0, 1, 1>(a.grid, nullptr, &in, &out).run(parallel, ScaledTerm<T>{Term(a.term), T(a.scale)});
}

// in: logits, grad
template <class T>
struct ScaledTermSlope {
  static constexpr int kKept = 0;
  Term term;
  T scale;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = term_slope(term, in[0]) * (in[1] * Vec<T>(scale));
  }
};

template <class T>
void logit_term_backward_in(const LogitTermBackward& a, const Parallel& parallel) {
  const Array in[2] = {elements(a.logits, a), arithmetic(a.grad, a)}, out = elements(a.grad_logits, a);
  Map<T, 0, 2, 1>(a.grid, nullptr, in, &out).run(parallel, ScaledTermSlope<T>{Term(a.term), T(a.scale)});
}

}  // namespace

void logit_loss(const LogitLoss& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_loss_in<decltype(t)>(a, parallel); });
}
void logit_loss_backward(const LogitLossBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_loss_backward_in<decltype(t)>(a, parallel); });
}
void logit_term(const LogitTerm& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_term_in<decltype(t)>(a, parallel); });
}
void logit_term_backward(const LogitTermBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_term_backward_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
