// Sums over the event of a formula's value, as the drivers' function objects.
#pragma once

#include "../formulas/likelihood.h"
#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

// One logarithm for many elements: state 1 is the product of their factors 1 + tail, less 1, so that small tails are not
// rounded away. kFlush factors of at most 2 stay finite. in: logits, x.
struct BernoulliSum {
  static constexpr int kStates = 2;

  template <class V>
  static UNIGEN_INLINE void multiply(V& product, V tail) {
    product = product * (constant<V>(1) + tail) + tail;
  }

  template <class V>
  UNIGEN_INLINE void add(V* state, const V* in) const {
    const BernoulliTerms<V> terms(in[0], in[1]);
    state[0] = terms.less_linear(state[0]);
    multiply(state[1], terms.tail);
  }
  template <class V>
  UNIGEN_INLINE V close(const V* state) const {
    return state[0] - log1p(state[1]);
  }
};

// A sum of vectors in double precision.
template <class T>
class WideSum {
 public:
  WideSum() = default;

  // x · factor
  UNIGEN_INLINE void add(Vec<T> x, double factor = 1) {
    if constexpr (sizeof(T) == 8) {
      low_ = low_ + x * Vec<double>(factor);
    } else {
      const Halves halves = widen(x);
      low_ = low_ + halves.low * Vec<double>(factor);
      high_ = high_ + halves.high * Vec<double>(factor);
    }
  }
  UNIGEN_INLINE double total() const { return lane_sum(low_ + high_); }

 private:
  Vec<double> low_{0.0}, high_{0.0};
};

template <class F, class V>
UNIGEN_NOINLINE V value_out_of_line(const F& formula, const V* in) {
  return formula.value(in);
}
template <class F, class V>
UNIGEN_NOINLINE void slopes_out_of_line(const F& formula, const V* in, V* out) {
  formula.slopes(in, out);
}

// Few of the copies that the drivers make of a formula are worth their instructions.
template <class F, class V>
constexpr bool kOutOfLine = F::kLarge || sizeof(Scalar<V>) == 8;

template <class F, class V>
UNIGEN_INLINE V value_of(const F& formula, const V* in) {
  if constexpr (kOutOfLine<F, V>) return value_out_of_line(formula, in);
  else return formula.value(in);
}
template <class F, class V>
UNIGEN_INLINE void slopes_of(const F& formula, const V* in, V* out) {
  if constexpr (kOutOfLine<F, V>) slopes_out_of_line(formula, in, out);
  else formula.slopes(in, out);
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
