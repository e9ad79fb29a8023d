// What every formula is written in: a number type N, which is `float` or `double` on a GPU and a vector of them on a
// CPU (csrc/cpu/vec.h). The functions below are found by overload. No torch, no loops over data.
#pragma once

#include <cmath>
#include <cstdint>

#include "../kernels/problem.h"


namespace unigen {

// ---- scalars; csrc/cpu/vec.h has the same names for vectors -----------------------------------------------------

UNIGEN_INLINE float exp(float x) { return ::expf(x); }
UNIGEN_INLINE double exp(double x) { return ::exp(x); }
// for x <= 0; may be 0 where the result is denormal
UNIGEN_INLINE float exp_of_distance(float x) { return ::expf(x); }
UNIGEN_INLINE double exp_of_distance(double x) { return ::exp(x); }
// e^x as it is, and where it would be infinite the largest power of e that is not: 0 times it is 0
UNIGEN_INLINE float finite_exp(float x) { return ::expf(88.7f < x ? 88.7f : x); }
UNIGEN_INLINE double finite_exp(double x) { return ::exp(709.7 < x ? 709.7 : x); }
UNIGEN_INLINE float exp_of_minus_abs(float x) { return ::expf(-::fabsf(x)); }
UNIGEN_INLINE double exp_of_minus_abs(double x) { return ::exp(-::fabs(x)); }
UNIGEN_INLINE float reciprocal(float x) { return 1 / x; }
UNIGEN_INLINE double reciprocal(double x) { return 1 / x; }
// for x that is finite, as 1 / x is
UNIGEN_INLINE float bounded_reciprocal(float x) { return reciprocal(x); }
UNIGEN_INLINE double bounded_reciprocal(double x) { return reciprocal(x); }
UNIGEN_INLINE float expm1(float x) { return ::expm1f(x); }
UNIGEN_INLINE double expm1(double x) { return ::expm1(x); }
UNIGEN_INLINE float log(float x) { return ::logf(x); }
UNIGEN_INLINE double log(double x) { return ::log(x); }
UNIGEN_INLINE float abs(float x) { return ::fabsf(x); }
UNIGEN_INLINE double abs(double x) { return ::fabs(x); }
UNIGEN_INLINE float log1p(float x) { return ::log1pf(x); }
UNIGEN_INLINE double log1p(double x) { return ::log1p(x); }

// log(1 + x) for x in [0, 1] only: what softplus needs, for less
UNIGEN_INLINE float log1p_unit(float x) { return ::log1pf(x); }
UNIGEN_INLINE double log1p_unit(double x) { return ::log1p(x); }

// condition ? yes : no, lane by lane; no branch
UNIGEN_INLINE float select(bool condition, float yes, float no) { return condition ? yes : no; }
UNIGEN_INLINE double select(bool condition, double yes, double no) { return condition ? yes : no; }

// a number that is not negative, with the sign of another
UNIGEN_INLINE float with_sign(float x, float sign) { return ::copysignf(x, sign); }
UNIGEN_INLINE double with_sign(double x, double sign) { return ::copysign(x, sign); }
// 0 where x has a negative sign (-0 too), else 1
UNIGEN_INLINE float heaviside(float x) { return 0.5f + with_sign(0.5f, x); }
UNIGEN_INLINE double heaviside(double x) { return 0.5 + with_sign(0.5, x); }

// whether a condition holds in any lane
UNIGEN_INLINE bool any(bool condition) { return condition; }

// the element type of a number: N(Scalar<N>(1)) makes a constant
template <class N>
struct ScalarOf {
  using type = N;
};
template <class N>
using Scalar = typename ScalarOf<N>::type;

template <class N>
UNIGEN_INLINE N constant(double x) {
  return N(Scalar<N>(x));
}

// the largest and the smallest that have all their digits
template <class N>
UNIGEN_INLINE N largest() {
  return constant<N>(sizeof(Scalar<N>) == 8 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127);
}
template <class N>
UNIGEN_INLINE N smallest_normal() {
  return constant<N>(sizeof(Scalar<N>) == 8 ? 0x1p-1022 : 0x1p-126);
}

// A formula of a few numbers, for the kernels `row_formula`, has kInputs and
//   value(in)         one element's share of the row
//   slopes(in, out)   the derivatives of that in each of the numbers, whichever are wanted
struct FormulaBase {
  static constexpr bool kWeighted = false;  // whether its rows may have weights
  static constexpr bool kLarge = false;     // too many instructions for several copies
};

// ---- functions of numbers that several families share --------------------------------------------------------------

// the larger one; NaN in `x` stays
template <class N>
UNIGEN_INLINE N maximum(N x, N bound) {
  return select(x < bound, bound, x);
}

// the smaller one; NaN in `x` stays
template <class N>
UNIGEN_INLINE N minimum(N x, N bound) {
  return select(bound < x, bound, x);
}

// weight · payload, in which a weight of 0 excludes the payload, NaN and infinity too
template <class N>
UNIGEN_INLINE N weighted(N weight, N payload) {
  return select(weight == constant<N>(0), constant<N>(0), weight * payload);
}

// e^{-|x|} and what follows from it: everything logistic, with one exponential
template <class N>
struct Logistic {
  N tail;      // e^{-|x|}, in [0, 1]
  N of_abs;    // 1 / (1 + tail) = sigma(|x|)
  decltype(N() < N()) positive;

  UNIGEN_INLINE explicit Logistic(N x)
      : tail(exp_of_minus_abs(x)), of_abs(bounded_reciprocal(constant<N>(1) + tail)), positive(constant<N>(0) < x) {}

  UNIGEN_INLINE N sigmoid() const { return of_abs * select(positive, constant<N>(1), tail); }           // sigma(x)
  UNIGEN_INLINE N sigmoid_of_minus() const { return of_abs * select(positive, tail, constant<N>(1)); }  // sigma(-x)
};

// log(1 + e^x) = max(x, 0) + log1p(e^{-|x|})
template <class N>
UNIGEN_INLINE N softplus(N x) {
  return maximum(x, constant<N>(0)) + log1p_unit(exp_of_minus_abs(x));
}

template <int n>
struct Factorial {
  static constexpr double value = n * Factorial<n - 1>::value;
};
template <>
struct Factorial<0> {
  static constexpr double value = 1;
};

// sum of x^{i - n} / i! for i = n … last
template <int n, int last, class N>
UNIGEN_INLINE N exponential_series(N x) {
  constexpr double coefficient = 1 / Factorial<n>::value;
  if constexpr (n == last) {
    return constant<N>(coefficient);
  } else {
    return exponential_series<n + 1, last>(x) * x + constant<N>(coefficient);
  }
}

// sum of z^i / (2 i + 3) for i = n … last: artanh(s) = s + s³ · this, z = s²
template <int n, int last, class N>
UNIGEN_INLINE N artanh_series(N z) {
  constexpr double coefficient = 1.0 / (2 * n + 3);
  if constexpr (n == last) {
    return constant<N>(coefficient);
  } else {
    return artanh_series<n + 1, last>(z) * z + constant<N>(coefficient);
  }
}

// log(1 + x) - x for x in [-1/2, 1], not cancelling near 0: log(1 + x) = 2 artanh(s), s = x / (2 + x), |s| <= 1/3
template <class N>
UNIGEN_INLINE N log1p_minus(N x) {
  constexpr int last = sizeof(Scalar<N>) == 8 ? 16 : 7;
  const N s = x / (constant<N>(2) + x), z = s * s;
  return s * (constant<N>(2) * z * artanh_series<0, last>(z) - x);
}

// e^x - 1 and e^x - 1 - x, neither cancelling near 0
template <class N>
struct ExpTerms {
  N minus_1, minus_1_minus_x;

  UNIGEN_INLINE explicit ExpTerms(N x) : minus_1(expm1(x)) {
    // Taylor's series for |x| < 1/2; beyond, the difference loses at most a digit
    constexpr int last = sizeof(Scalar<N>) == 8 ? 15 : 9;
    minus_1_minus_x = select(abs(x) < constant<N>(0.5), exponential_series<2, last>(x) * x * x, minus_1 - x);
  }
};

}  // namespace unigen
