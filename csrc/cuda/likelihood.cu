// Log-likelihoods, and every other formula of a few numbers, summed over the event.
#include "../formulas/rows.h"

#include "rows.cuh"

namespace unigen::cuda {
namespace {

template <class Element>
struct BernoulliOp : BernoulliLogProb, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Sum;
  static constexpr bool kReduces = true;
  static constexpr int kVector = kWidest<E>, kUnroll = 4;

  explicit BernoulliOp(const BernoulliLogProb& a) : BernoulliLogProb(a) {}

  template <int V>
  struct Loaded {
    Pack<E, V> logits, x;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<E>(logits), place.template load<E>(x)};
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&given)[U], const bool (&valid)[U], At) const {
    static_assert(U * C <= 96, "the product of the factors, each at most 2, overflows");
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T sum = 0, product = 0;  // product of the factors 1 + tail, minus 1: one logarithm for all of them
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          if (!valid[u]) continue;
          const BernoulliTerms<T> terms(given[u].logits.template get<T>(r + c), given[u].x.template get<T>(r + c));
          sum = terms.less_linear(sum);
          product += terms.tail + product * terms.tail;
        }
      }
      state[r].value += double(sum - log1p(product));
    }
  }

  UNIGEN_DEVICE double finish(const Rows& rows, int r, const State& s) const {
    rows.at<T>(value, r) = T(s.value);
    return s.value;
  }
};

template <class Element>
struct BernoulliBackwardOp : BernoulliLogProbBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using Row = T;  // its gradient
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = sizeof(E) == 2 ? 2 : 4;

  explicit BernoulliBackwardOp(const BernoulliLogProbBackward& a) : BernoulliLogProbBackward(a) {}

  template <int V>
  struct Loaded {
    Pack<E, V> logits, x;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<E>(logits), place.template load<E>(x)};
  }

  UNIGEN_DEVICE Row context(const Rows& rows, int r, NoState) const { return rows.at<T>(grad, r); }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& given) const {
    T result[R * C];
    if (grad_logits.data) {
#pragma unroll
      for (int v = 0; v < R * C; ++v)
        result[v] = weighted(row[R > 1 ? v : 0],
                             BernoulliTerms<T>(given.logits.template get<T>(v), given.x.template get<T>(v)).slope());
      place.template store<E>(grad_logits, result);
    }
    if (grad_x.data) {
#pragma unroll
      for (int v = 0; v < R * C; ++v) result[v] = weighted(row[R > 1 ? v : 0], given.logits.template get<T>(v));
      place.template store<E>(grad_x, result);
    }
  }
};

// ---- formulas ------------------------------------------------------------------------------------------------------

// Packs of a formula's inputs, and of the weights where it may have some.
template <class E, class F, int V, bool = F::kWeighted>
struct FormulaPacks {
  Pack<E, V> in[F::kInputs];
  Pack<Arithmetic<E>, V> weights;
};
template <class E, class F, int V>
struct FormulaPacks<E, F, V, false> {
  Pack<E, V> in[F::kInputs];
};

template <class E, class F, int R, int C, class Arguments>
UNIGEN_DEVICE FormulaPacks<E, F, R * C> load_formula(const Place<R, C>& place, const Arguments& a) {
  FormulaPacks<E, F, R * C> x;
#pragma unroll
  for (int k = 0; k < F::kInputs; ++k) x.in[k] = place.template load<E>(a.in[k]);
  if constexpr (F::kWeighted) {
    if (a.weights.data) x.weights = place.template load<Arithmetic<E>>(a.weights);
  }
  return x;
}

template <class T, class F, class Packs>
UNIGEN_DEVICE void numbers(const Packs& x, int v, T (&in)[F::kInputs]) {
#pragma unroll
  for (int k = 0; k < F::kInputs; ++k) in[k] = x.in[k].template get<T>(v);
}

template <class Element, class F>
struct FormulaOp : RowFormula, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Sum;
  static constexpr bool kReduces = true, kTotals = true;
  static constexpr int kVector = kWidest<E> < 4 ? kWidest<E> : 4, kUnroll = F::kInputs > 3 || F::kLarge ? 1 : 2;
  template <int V>
  using Loaded = FormulaPacks<E, F, V>;
  F formula;

  FormulaOp(const RowFormula& a, const F& formula) : RowFormula(a), formula(formula) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return load_formula<E, F>(place, *this);
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T sum = 0;
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          if (!valid[u]) continue;
          T in[F::kInputs];
          numbers<T, F>(x[u], r + c, in);
          T term = formula.value(in);
          if constexpr (F::kWeighted) {
            if (weights.data) term = weighted(x[u].weights.x[r + c], term);
          }
          sum += term;
        }
      }
      state[r].value += double(sum);
    }
  }

  UNIGEN_DEVICE double finish(const Rows& rows, int r, const State& s) const {
    if (!reduction.reduce) rows.at<T>(value, r) = T(s.value) * T(reduction.scale);
    return s.value;
  }
};

template <class Element, class F>
struct FormulaBackwardOp : RowFormulaBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using Row = T;  // its gradient, scale included
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E> < 4 ? kWidest<E> : 4, kUnroll = 1;
  template <int V>
  using Loaded = FormulaPacks<E, F, V>;
  F formula;

  FormulaBackwardOp(const RowFormulaBackward& a, const F& formula) : RowFormulaBackward(a), formula(formula) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return load_formula<E, F>(place, *this);
  }

  UNIGEN_DEVICE Row context(const Rows& at, int r, NoState) const {
    return at.at<T>(grad, r) * T(reduction.scale / reduction.denominator);
  }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& x) const {
    constexpr int V = R * C;
    T result[F::kInputs][V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      T in[F::kInputs], out[F::kInputs];
      numbers<T, F>(x, v, in);
      formula.slopes(in, out);
      T g = row[R > 1 ? v : 0];
      if constexpr (F::kWeighted) {
        if (weights.data) g = weighted(x.weights.x[v], g);
      }
#pragma unroll
      for (int k = 0; k < F::kInputs; ++k) result[k][v] = weighted(g, out[k]);
    }
#pragma unroll
    for (int k = 0; k < F::kInputs; ++k)
      if (grad_in[k].data) place.template store<E>(grad_in[k], result[k]);
  }
};

}  // namespace

const char* bernoulli_log_prob(const BernoulliLogProb& arguments, const Launch& launch) {
  BernoulliLogProb a = arguments;
  align(a.grid, {&a.logits, &a.x, &a.value});
  return dispatch(a.dtype, [&](auto e) {
    return run_rows(BernoulliOp<decltype(e)>(a), {{&a.logits, sizeof(e)}, {&a.x, sizeof(e)}}, launch);
  });
}

const char* bernoulli_log_prob_backward(const BernoulliLogProbBackward& arguments, const Launch& launch) {
  BernoulliLogProbBackward a = arguments;
  align(a.grid, {&a.grad, &a.logits, &a.x, &a.grad_logits, &a.grad_x});
  return dispatch(a.dtype, [&](auto e) {
    return run_rows(BernoulliBackwardOp<decltype(e)>(a),
                    {{&a.logits, sizeof(e)},
                     {&a.x, sizeof(e)},
                     {&a.grad_logits, sizeof(e), true},
                     {&a.grad_x, sizeof(e), true}},
                    launch);
  });
}

const char* row_formula(const RowFormula& arguments, const Launch& launch) {
  RowFormula a = arguments;
  align(a.grid, {&a.in[0], &a.in[1], &a.in[2], &a.in[3], &a.in[4], &a.weights, &a.value});
  const int wide = a.dtype == DType::float64 ? 8 : 4;
  const int size = a.dtype == DType::bfloat16 || a.dtype == DType::float16 ? 2 : wide;
  return with_formula(a.options, [&](auto formula) {
    return dispatch(a.dtype, [&](auto e) {
      return run_rows(FormulaOp<decltype(e), decltype(formula)>(a, formula),
                      {{&a.in[0], size},
                       {&a.in[1], size},
                       {&a.in[2], size},
                       {&a.in[3], size},
                       {&a.in[4], size},
                       {&a.weights, wide}},
                      launch, a.reduction.reduce);
    });
  });
}

const char* row_formula_backward(const RowFormulaBackward& arguments, const Launch& launch) {
  RowFormulaBackward a = arguments;
  align(a.grid, {&a.grad, &a.in[0], &a.in[1], &a.in[2], &a.in[3], &a.in[4], &a.weights, &a.grad_in[0], &a.grad_in[1],
                 &a.grad_in[2], &a.grad_in[3], &a.grad_in[4]});
  const int wide = a.dtype == DType::float64 ? 8 : 4;
  const int size = a.dtype == DType::bfloat16 || a.dtype == DType::float16 ? 2 : wide;
  return with_formula(a.options, [&](auto formula) {
    return dispatch(a.dtype, [&](auto e) {
      return run_rows(FormulaBackwardOp<decltype(e), decltype(formula)>(a, formula),
                      {{&a.in[0], size},
                       {&a.in[1], size},
                       {&a.in[2], size},
                       {&a.in[3], size},
                       {&a.in[4], size},
                       {&a.weights, wide},
                       {&a.grad_in[0], size, true},
                       {&a.grad_in[1], size, true},
                       {&a.grad_in[2], size, true},
                       {&a.grad_in[3], size, true},
                       {&a.grad_in[4], size, true}},
                      launch);
    });
  });
}

}  // namespace unigen::cuda
