// Elementwise terms of log-likelihoods and their derivatives.
#pragma once

#include "number.h"

namespace unigen {

// -log Bernoulli(x; sigma(l)) = linear + log1p(tail): the caller may multiply the factors 1 + tail of many elements
// (each in [1, 2]) and take one logarithm of the product.
template <class N>
struct BernoulliTerms {
  N linear;  // relu(l) - x·l >= 0
  N tail;    // e^{-|l|}

  UNIGEN_INLINE BernoulliTerms(N l, N x) {
    const N zero = constant<N>(0);
    const N coefficient = select(zero < l, constant<N>(1) - x, -x);
    linear = select(coefficient == zero, zero, coefficient * l);  // an infinite logit on its own side costs nothing
    linear = select(l == l, linear, l);
    tail = exp(-abs(l));
  }
};

// d log Bernoulli / d l = x - sigma(l) = x·sigma(-l) - (1 - x)·sigma(l), which cancels nothing for x in {0, 1}
template <class N>
UNIGEN_INLINE N bernoulli_slope(N l, N x) {
  const Logistic<N> logistic(l);
  return x * logistic.sigmoid_of_minus() - (constant<N>(1) - x) * logistic.sigmoid();
}

// d log Bernoulli / d x = l

}  // namespace unigen
