// Elementwise terms of discriminator and generator losses, numbered as in unigen_fast/reference/adversarial.py.
#pragma once

#include "number.h"

namespace unigen {

enum class Term : int { logistic_real, logistic_fake, saturating, hinge_real, hinge_fake, linear };

constexpr int kTerms = 6;

// whether the logits are meant to be positive: what accuracy counts
UNIGEN_INLINE bool wants_positive(Term term) { return term != Term::logistic_fake && term != Term::hinge_fake; }

template <class N>
UNIGEN_INLINE N term_value(Term term, N l) {
  const N zero = constant<N>(0), one = constant<N>(1);
  switch (term) {
    case Term::hinge_real: return maximum(one - l, zero);
    case Term::hinge_fake: return maximum(one + l, zero);
    case Term::linear: return -l;
    default: break;
  }
  const N value = softplus(term == Term::logistic_real ? -l : l);  // one softplus: it is inlined
  return term == Term::saturating ? -value : value;
}

// d term / d l. At its kink a hinge has slope 0, as relu in PyTorch.
template <class N>
UNIGEN_INLINE N term_slope(Term term, N l) {
  const N zero = constant<N>(0), one = constant<N>(1);
  switch (term) {
    case Term::hinge_real: return select(l < one, -one, zero);
    case Term::hinge_fake: return select(-one < l, one, zero);
    case Term::linear: return -one;
    default: break;
  }
  const N value = Logistic<N>(term == Term::logistic_real ? -l : l).sigmoid();
  return term == Term::logistic_fake ? value : -value;
}

}  // namespace unigen
