// Kernels of log-likelihoods, and of every other formula of a few numbers: sums over the event, and gradients.
#include <type_traits>

#include "../formulas/rows.h"
#include "densities.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

template <class T>
void bernoulli_log_prob_in(const BernoulliLogProb& a, const Parallel& parallel) {
  const Array in[2] = {elements(a.logits, a), elements(a.x, a)};
  const RowSum<T, 2, BernoulliSum> sum(a.grid, in, {});
  RowResults<T> results(a.grid, arithmetic(a.value, a), {}, sum.units());
  sum.run(parallel, [&](int64_t unit, int64_t row, int n, const double* totals) {
    results.take_totals(unit, row, n, totals);
  });
}

template <class T>
struct BernoulliSlope {
  static constexpr int kKept = 1;

  UNIGEN_INLINE void prepare(const Vec<T>* grad, Vec<T>* row) const { row[0] = grad[0]; }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    out[0] = row[0] * BernoulliTerms<Vec<T>>(in[0], in[1]).slope();
  }
};

// d / d logits and d / d x
template <class T>
struct BernoulliSlopes {
  static constexpr int kKept = 1;

  UNIGEN_INLINE void prepare(const Vec<T>* grad, Vec<T>* row) const { row[0] = grad[0]; }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    out[0] = row[0] * BernoulliTerms<Vec<T>>(in[0], in[1]).slope();
    out[1] = row[0] * in[0];
  }
};

template <class T>
void bernoulli_log_prob_backward_in(const BernoulliLogProbBackward& a, const Parallel& parallel) {
  const Array row = arithmetic(a.grad, a), in[2] = {elements(a.logits, a), elements(a.x, a)};
  const Array out[2] = {elements(a.grad_logits, a), elements(a.grad_x, a)};
  if (a.grad_x.data) {
    Map<T, 1, 2, 2, 1>(a.grid, &row, in, out).run(parallel, BernoulliSlopes<T>());
  } else {
    Map<T, 1, 2, 1, 1>(a.grid, &row, in, out).run(parallel, BernoulliSlope<T>());
  }
}

// ---- formulas ------------------------------------------------------------------------------------------------------

// The last of the inputs is the weight, where there is one.
template <class F, bool kWeighted>
struct FormulaSum {
  static constexpr int kStates = 1, kInputs = F::kInputs + kWeighted;
  F formula;

  template <class V>
  UNIGEN_INLINE void add(V* state, const V* in) const {
    V value = value_of(formula, in);
    if constexpr (kWeighted) value = weighted(in[F::kInputs], value);
    state[0] = state[0] + value;
  }
  template <class V>
  UNIGEN_INLINE V close(const V* state) const {
    return state[0];
  }
};

template <class F, bool kWeighted>
struct FormulaSlopes {
  static constexpr int kKept = 1, kInputs = F::kInputs + kWeighted;
  F formula;
  double factor;

  template <class V>
  UNIGEN_INLINE void prepare(const V* grad, V* row) const {
    row[0] = grad[0] * constant<V>(factor);
  }
  template <class V>
  UNIGEN_INLINE void operator()(const V* row, const V* in, V* out) const {
    slopes_of(formula, in, out);
    V coefficient = row[0];
    if constexpr (kWeighted) coefficient = coefficient * in[F::kInputs];
    for (int k = 0; k < F::kInputs; ++k) out[k] = kWeighted ? weighted(coefficient, out[k]) : coefficient * out[k];
  }
};

// calls body(formula, whether there are weights)
template <class Arguments, class Body>
UNIGEN_INLINE void with_weights(const Arguments& a, const Body& body) {
  with_formula(a.options, [&](auto formula) {
    if constexpr (decltype(formula)::kWeighted) {
      if (a.weights.data) return body(formula, std::true_type());
    }
    body(formula, std::false_type());
  });
}

template <class T, class Arguments>
void formula_inputs(const Arguments& a, Array* in, int count) {
  for (int k = 0; k < count; ++k) in[k] = elements(a.in[k], a);
  in[count] = arithmetic(a.weights, a);
}

template <class T>
void row_formula_in(const RowFormula& a, const Parallel& parallel) {
  with_weights(a, [&](auto formula, auto weighted) {
    using Sum = FormulaSum<decltype(formula), weighted>;
    Array in[kMaxFormulaInputs + 1];
    formula_inputs<T>(a, in, decltype(formula)::kInputs);
    const RowSum<T, Sum::kInputs, Sum> sum(a.grid, in, {formula});
    RowResults<T> results(a.grid, arithmetic(a.value, a), a.reduction, sum.units());
    sum.run(parallel, [&](int64_t unit, int64_t row, int n, const double* totals) {
      results.take_totals(unit, row, n, totals);
    });
    results.close();
  });
}

template <class T>
void row_formula_backward_in(const RowFormulaBackward& a, const Parallel& parallel) {
  with_weights(a, [&](auto formula, auto weighted) {
    using Slopes = FormulaSlopes<decltype(formula), weighted>;
    constexpr int kOut = decltype(formula)::kInputs;
    Array row = arithmetic(a.grad, a), in[kMaxFormulaInputs + 1], out[kMaxFormulaInputs];
    formula_inputs<T>(a, in, kOut);
    for (int k = 0; k < kOut; ++k) out[k] = elements(a.grad_in[k], a);
    const double factor = a.reduction.scale / a.reduction.denominator;
    Map<T, 1, Slopes::kInputs, kOut, 1>(a.grid, &row, in, out).run(parallel, Slopes{formula, factor});
  });
}

}  // namespace

void bernoulli_log_prob(const BernoulliLogProb& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { bernoulli_log_prob_in<decltype(t)>(a, parallel); });
}
void bernoulli_log_prob_backward(const BernoulliLogProbBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { bernoulli_log_prob_backward_in<decltype(t)>(a, parallel); });
}
void row_formula(const RowFormula& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { row_formula_in<decltype(t)>(a, parallel); });
}
void row_formula_backward(const RowFormulaBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { row_formula_backward_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
