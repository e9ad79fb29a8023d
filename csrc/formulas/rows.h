// The formulas that the kernels `row_formula` sum over the event: a new one is a struct, a number, and a line below.
#pragma once

#include "../kernels/likelihood.h"
#include "divergence.h"
#include "likelihood.h"

namespace unigen {

// what body(the formula) returns
template <class Body>
inline auto with_formula(const FormulaOptions& o, const Body& body) {
  switch (o.formula) {
    case Formula::laplace_log_prob: return body(LaplaceLogProb{});
    case Formula::discretized_logistic_log_prob: return body(DiscretizedLogisticLogProb{{}, o.bins});
    case Formula::negative_binomial_log_prob:
      if (o.eps > 0) return body(NegativeBinomialLogProb<true>{{}, o.data_slope, o.eps});
      return body(NegativeBinomialLogProb<false>{{}, o.data_slope});
    case Formula::zero_inflated_negative_binomial_log_prob:
      if (o.eps > 0) return body(ZeroInflatedNegativeBinomialLogProb<true>{{}, o.data_slope, o.eps});
      return body(ZeroInflatedNegativeBinomialLogProb<false>{{}, o.data_slope});
    case Formula::gaussian_kl_monte_carlo: return body(MonteCarloKl<true>{{}, o.spread});
    case Formula::gaussian_kl_entropy: return body(MonteCarloKl<false>{{}, o.spread});
    case Formula::bernoulli_kl: return body(BernoulliKl<true>{});
    case Formula::bernoulli_kl_half: return body(BernoulliKl<false>{});
    default: return body(GaussianLogProb{{}, o.spread});
  }
}

}  // namespace unigen
