// The likelihoods that a bound may have: formulas of the data and of what the decoder gave, in this order.
#pragma once

#include "../kernels/objectives.h"
#include "divergence.h"
#include "importance.h"
#include "likelihood.h"

namespace unigen {

// in: x, logits
struct BernoulliDensity : FormulaBase {
  static constexpr int kInputs = 2;

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const BernoulliTerms<N> terms(in[1], in[0]);
    return terms.less_linear(-log1p_unit(terms.tail));
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    out[0] = in[1];
    out[1] = BernoulliTerms<N>(in[1], in[0]).slope();
  }
};

// in: x, mean. Of variance 1.
struct UnitGaussianDensity : FormulaBase {
  static constexpr int kInputs = 2;

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const N difference = in[0] - in[1];
    return constant<N>(-0.5) * (difference * difference + constant<N>(1.83787706640934548356));
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    out[1] = in[0] - in[1];
    out[0] = -out[1];
  }
};

// what body(the formula) returns; no slope in x is wanted
template <class Body>
inline auto with_likelihood(const LikelihoodOptions& o, const Body& body) {
  switch (o.likelihood) {
    case Likelihood::unit_gaussian: return body(UnitGaussianDensity{});
    case Likelihood::gaussian: return body(GaussianLogProb{{}, {Spread::logvar, -HUGE_VAL, HUGE_VAL}});
    case Likelihood::laplace: return body(LaplaceLogProb{});
    case Likelihood::discretized_logistic: return body(DiscretizedLogisticLogProb{{}, o.bins});
    case Likelihood::negative_binomial: return body(NegativeBinomialLogProb<false>{{}, false});
    case Likelihood::zero_inflated_negative_binomial: return body(ZeroInflatedNegativeBinomialLogProb<false>{{}, false});
    default: return body(BernoulliDensity{});
  }
}

// A number z of the sample's latent: its log p(z) - log q(z), and the slopes of that.
//   half (v_q - v_p) + half ((z - m_q)² e^{-v_q} - (z - m_p)² e^{-v_p})
// with 1 / sigma_q and 1 / sigma_p, the same for all samples of an example, given.
template <class N>
struct LatentTerms {
  Standardized<N> own, prior;  // z - m_q, z - m_p

  UNIGEN_INLINE LatentTerms(N z, N mean, N own_rate, N prior_mean, N prior_rate)
      : own(z - mean, own_rate), prior(z - prior_mean, prior_rate) {}

  // less the half (v_q - v_p)
  UNIGEN_INLINE N value() const { return constant<N>(0.5) * (own.square() - prior.square()); }
  UNIGEN_INLINE N of_z() const { return own.slope() - prior.slope(); }
  UNIGEN_INLINE N of_mean() const { return -own.slope(); }
  UNIGEN_INLINE N of_logvar() const { return constant<N>(0.5) * (constant<N>(1) - own.square()); }
  UNIGEN_INLINE N of_prior_mean() const { return prior.slope(); }
  UNIGEN_INLINE N of_prior_logvar() const { return constant<N>(0.5) * (prior.square() - constant<N>(1)); }
};

}  // namespace unigen
