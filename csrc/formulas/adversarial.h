// Elementwise terms of discriminator and generator losses.
#pragma once

#include "../kernels/adversarial.h"
#include "number.h"

namespace unigen {

// whether the logits are meant to be above the term's boundary, or below: what accuracy counts
UNIGEN_INLINE bool wants_positive(Term term) {
  switch (term) {
    case Term::logistic_fake:
    case Term::hinge_fake:
    case Term::identity:
    case Term::least_squares_fake:
    case Term::least_squares_minus:
    case Term::kl_fake:
    case Term::reverse_kl_real:
    case Term::pearson_fake:
    case Term::expm1_real:
    case Term::js_fake: return false;
    default: return true;
  }
}
UNIGEN_INLINE double boundary(Term term) {
  switch (term) {
    case Term::least_squares_real:
    case Term::least_squares_fake: return 0.5;
    case Term::kl_real:
    case Term::kl_fake: return 1;
    default: return 0;
  }
}

// what least squares pull the logit to
template <class N>
UNIGEN_INLINE N least_squares_target(Term term) {
  return constant<N>(term == Term::least_squares_real ? 1 : term == Term::least_squares_minus ? -1 : 0);
}

// what the exponential terms are an exponential of
template <class N>
UNIGEN_INLINE N exponent(Term term, N l) {
  switch (term) {
    case Term::kl_fake: return l - constant<N>(1);
    case Term::neyman_fake: return constant<N>(0.5) * l;
    case Term::hellinger_fake: return -l;
    default: return l;
  }
}

template <class N>
UNIGEN_INLINE N term_value(Term term, N l) {
  const N zero = constant<N>(0), one = constant<N>(1), half = constant<N>(0.5);
  switch (term) {
    case Term::hinge_real: return maximum(one - l, zero);
    case Term::hinge_fake: return maximum(one + l, zero);
    case Term::linear:
    case Term::kl_real: return -l;
    case Term::identity: return l;
    case Term::reverse_kl_fake: return -one - l;
    case Term::pearson_fake: return l * (constant<N>(0.25) * l + one);
    case Term::least_squares_real:
    case Term::least_squares_fake:
    case Term::least_squares_minus: {
      const N distance = l - least_squares_target<N>(term);
      return half * distance * distance;
    }
    case Term::kl_fake:
    case Term::reverse_kl_real: return exp(exponent(term, l));
    case Term::expm1_real:
    case Term::neyman_fake:
    case Term::hellinger_fake: {
      const N value = ExpTerms<N>(exponent(term, l)).minus_1;
      return term == Term::neyman_fake ? constant<N>(-2) * value : value;
    }
    case Term::js_real:
    case Term::js_fake: {  // softplus - log 2, which would cancel near 0
      const N x = term == Term::js_real ? -l : l;
      return maximum(x, zero) + log1p(half * ExpTerms<N>(-abs(x)).minus_1);
    }
    default: break;
  }
  const N value = softplus(term == Term::logistic_real ? -l : l);  // one softplus: it is inlined
  return term == Term::saturating ? -value : value;
}

// d term / d l. At its kink a hinge has slope 0, and at a NaN that of its line, as relu in PyTorch.
template <class N>
UNIGEN_INLINE N term_slope(Term term, N l) {
  const N zero = constant<N>(0), one = constant<N>(1);
  switch (term) {
    case Term::hinge_real: return select(l < one, -one, select(l == l, zero, -one));
    case Term::hinge_fake: return select(-one < l, one, select(l == l, zero, one));
    case Term::linear:
    case Term::kl_real:
    case Term::reverse_kl_fake: return -one;
    case Term::identity: return one;
    case Term::pearson_fake: return constant<N>(0.5) * l + one;
    case Term::least_squares_real:
    case Term::least_squares_fake:
    case Term::least_squares_minus: return l - least_squares_target<N>(term);
    case Term::kl_fake:
    case Term::reverse_kl_real:
    case Term::expm1_real:
    case Term::neyman_fake:
    case Term::hellinger_fake: {
      const N value = exp(exponent(term, l));
      return term == Term::neyman_fake || term == Term::hellinger_fake ? -value : value;
    }
    default: break;
  }
  const bool real = term == Term::logistic_real || term == Term::js_real;
  const N value = Logistic<N>(real ? -l : l).sigmoid();
  return term == Term::logistic_fake || term == Term::js_fake ? value : -value;
}

// A logit as its term sees it, and d of that / d l with the tensor's summary held constant: the mean of the other side, or
// the maximum m and 1 / mean of exp(l - m).
template <class N>
struct Coupled {
  N logit, slope;

  UNIGEN_INLINE Coupled(Coupling coupling, N l, N summary, N inverse) : logit(l), slope(constant<N>(1)) {
    if (coupling == Coupling::averages) logit = l - summary;
    if (coupling == Coupling::ratios) {
      slope = exp_of_distance(l - summary) * inverse;
      // a ratio of 0 silences an infinite logit
      logit = select(slope == constant<N>(0), constant<N>(0), slope * l);
    }
  }
};

}  // namespace unigen
