// Log-likelihoods, summed over the event.
#include "../formulas/likelihood.h"

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
      T linear = 0, product = 0;  // product of the factors 1 + tail, minus 1: one logarithm for all of them
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          if (!valid[u]) continue;
          const BernoulliTerms<T> terms(given[u].logits.template get<T>(r + c), given[u].x.template get<T>(r + c));
          linear += terms.linear;
          product += terms.tail + product * terms.tail;
        }
      }
      state[r].value -= double(linear + log1p(product));
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
        result[v] = row[R > 1 ? v : 0] * bernoulli_slope(given.logits.template get<T>(v), given.x.template get<T>(v));
      place.template store<E>(grad_logits, result);
    }
    if (grad_x.data) {
#pragma unroll
      for (int v = 0; v < R * C; ++v) result[v] = row[R > 1 ? v : 0] * given.logits.template get<T>(v);
      place.template store<E>(grad_x, result);
    }
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

}  // namespace unigen::cuda
