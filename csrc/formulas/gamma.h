// What the logarithm of the gamma function differs from Stirling's formula by, and its derivative.
#pragma once

#include "number.h"

namespace unigen {

// Polynomial by Horner's rule, highest coefficient first.
template <class N>
UNIGEN_INLINE N polynomial(N, N sum) {
  return sum;
}
template <class N, class... Rest>
UNIGEN_INLINE N polynomial(N x, N sum, double next, Rest... rest) {
  return polynomial(x, sum * x + constant<N>(next), rest...);
}

// For n > 0: log Gamma(n) = (n - 1/2) log n - n + log(2 pi) / 2 + remainder(), the remainder being about 1 / (12 n).
//
// From `shift` on in powers of 1/n: the asymptotic series for double, a polynomial fitted to n >= 1 (to 7e-9 and 2e-8 / n²)
// for float. Below it from n + shift, by Gamma(n + 1) = n Gamma(n): few numbers, so a vector without any leaves that out.
template <class N>
struct Stirling {
  static constexpr bool wide = sizeof(Scalar<N>) == 8;
  static constexpr int shift = wide ? 8 : 1;

  N n;
  decltype(N() < N()) small;
  N far;      // n, or n + shift
  N inverse;  // 1 / far

  UNIGEN_INLINE explicit Stirling(N n)
      : n(n),
        small(n < constant<N>(shift)),
        far(select(small, n + constant<N>(shift), n)),
        inverse(constant<N>(1) / far) {}

  UNIGEN_INLINE N remainder() const {
    N result;
    if constexpr (wide) {
      result = inverse * polynomial(inverse * inverse, constant<N>(-3617.0 / 122400), 1.0 / 156, -691.0 / 360360, 1.0 / 1188,
                                    -1.0 / 1680, 1.0 / 1260, -1.0 / 360, 1.0 / 12);
    } else {
      result = inverse * polynomial(inverse, constant<N>(0.000142218940679), -0.000645669862866, 0.00106353309347,
                                    -6.09097331539e-5, -0.00277068811334, -3.49734539394e-7, 0.083333336717);
    }
    if (any(small)) {
      // (n + 1/2) log(far / n) - shift + the logarithm of the product of far / (n + i), 0 < i < shift
      const N rise = log(far / n);
      N below = (n + constant<N>(0.5)) * rise - constant<N>(shift);
      if constexpr (shift > 1) {
        N product = constant<N>(1);
        for (int i = 1; i < shift; ++i) product = product * far / (n + constant<N>(i));
        below = below + log(product);
      }
      result = select(small, result + below, result);
    }
    return result;
  }

  // d remainder / d far
  UNIGEN_INLINE N slope() const {
    const N square = inverse * inverse;
    if constexpr (wide) {
      return -square * polynomial(square, constant<N>(-3617.0 / 8160), 1.0 / 12, -691.0 / 32760, 1.0 / 132, -1.0 / 240,
                                  1.0 / 252, -1.0 / 120, 1.0 / 12);
    } else {
      return -square * polynomial(inverse, constant<N>(-0.000322592971157), 0.00200619824047, -0.00510446947153,
                                  0.00605148282846, -0.000465427588527, -0.00828049515488, -2.38085171515e-6,
                                  0.0833333517254);
    }
  }

  // what digamma(n) - log n has beyond that of `far`: 0 from `shift` on
  UNIGEN_INLINE N digamma_below() const {
    N result = constant<N>(0);
    if (any(small)) {
      N sum = constant<N>(0);
      for (int i = 0; i < shift; ++i) sum = sum + constant<N>(1) / (n + constant<N>(i));
      result = select(small, log(far / n) - sum, result);
    }
    return result;
  }

  // digamma(n) - log n
  UNIGEN_INLINE N digamma_minus_log() const { return slope() - constant<N>(0.5) * inverse + digamma_below(); }
};

// digamma(n + x) - log(n + x) - (digamma(n) - log n), given both Stirlings and x: to full relative accuracy for large n
template <class N>
UNIGEN_INLINE N digamma_minus_log_rise(const Stirling<N>& from, const Stirling<N>& to, N x) {
  const N shift = constant<N>(Stirling<N>::shift), zero = constant<N>(0);
  const N distance = x + select(to.small, shift, zero) - select(from.small, shift, zero);
  const N half = constant<N>(0.5) * distance * from.inverse * to.inverse;  // of 1 / (2 far)
  return half + (to.slope() - from.slope()) + (to.digamma_below() - from.digamma_below());
}

}  // namespace unigen
