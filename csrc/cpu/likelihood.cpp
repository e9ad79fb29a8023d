// Kernels of log-likelihoods: sums over the event, and gradients.
#include "../formulas/likelihood.h"

#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// One logarithm for many elements: state 1 is the product of their factors 1 + tail, less 1, so that small tails are not
// rounded away. kFlush factors of at most 2 stay finite. in: logits, x.
struct BernoulliSum {
  static constexpr int kStates = 2;

  template <class V>
  UNIGEN_INLINE void add(V* state, const V* in) const {
    const BernoulliTerms<V> terms(in[0], in[1]);
    state[0] = state[0] + terms.linear;
    state[1] = state[1] * terms.tail + (state[1] + terms.tail);
  }
  template <class V>
  UNIGEN_INLINE V close(const V* state) const {
    return -(state[0] + log1p(state[1]));
  }
};

template <class T>
void bernoulli_log_prob_in(const BernoulliLogProb& a, const Parallel& parallel) {
  const Array in[2] = {elements(a.logits, a), elements(a.x, a)};
  const RowSum<T, 2, BernoulliSum> sum(a.grid, in, {});
  RowResults<T> results(a.grid, arithmetic(a.value, a), {}, sum.units());
  sum.run(parallel, [&](int64_t unit, int64_t row, int n, const double* totals) {
    alignas(kVectorBytes) T values[kChunk<T>];
    for (int i = 0; i < n; ++i) values[i] = T(totals[i]);
    results.take(unit, row, n, values);
  });
}

template <class T>
struct BernoulliSlope {
  static constexpr int kKept = 1;

  UNIGEN_INLINE void prepare(const Vec<T>* grad, Vec<T>* row) const { row[0] = grad[0]; }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    out[0] = row[0] * bernoulli_slope(in[0], in[1]);
  }
};

// d / d logits and d / d x
template <class T>
struct BernoulliSlopes {
  static constexpr int kKept = 1;

  UNIGEN_INLINE void prepare(const Vec<T>* grad, Vec<T>* row) const { row[0] = grad[0]; }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    out[0] = row[0] * bernoulli_slope(in[0], in[1]);
    out[1] = row[0] * in[0];
  }
};

template <class T>
void bernoulli_log_prob_backward_in(const BernoulliLogProbBackward& a, const Parallel& parallel) {
  const Array row = arithmetic(a.grad, a), in[2] = {elements(a.logits, a), elements(a.x, a)};
  const Array out[2] = {elements(a.grad_logits, a), elements(a.grad_x, a)};
  if (a.grad_x.data) {
    Map<T, 1, 2, 2>(a.grid, &row, in, out).run(parallel, BernoulliSlopes<T>());
  } else {
    Map<T, 1, 2, 1>(a.grid, &row, in, out).run(parallel, BernoulliSlope<T>());
  }
}

}  // namespace

void bernoulli_log_prob(const BernoulliLogProb& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { bernoulli_log_prob_in<decltype(t)>(a, parallel); });
}
void bernoulli_log_prob_backward(const BernoulliLogProbBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { bernoulli_log_prob_backward_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
