// Elementwise terms of Gaussian divergences and of the reparameterised sample.
#pragma once

#include "../kernels/divergence.h"
#include "number.h"

namespace unigen {

template <class N>
struct LogVariance {
  N value;
  N slope;  // d value / d output; 0 outside the clamp, where NaN is too
  bool clamped;

  UNIGEN_INLINE LogVariance(N x, const SpreadOptions& options) : clamped(options.clamped()) {
    const N two = constant<N>(2);
    if (options.spread == Spread::std) {
      value = two * log(x);
      slope = two / x;
    } else if (options.spread == Spread::logstd) {
      value = two * x;
      slope = two;
    } else {
      value = x;
      slope = constant<N>(1);
    }
    if (clamped) {
      const N free = value;
      value = minimum(maximum(free, constant<N>(options.clamp_min)), constant<N>(options.clamp_max));
      slope = select(value == free, slope, constant<N>(0));
    }
  }

  // d / d output, given d / d value
  UNIGEN_INLINE N pull_back(N of_value) const {
    return clamped ? weighted(slope, of_value) : of_value * slope;
  }
};

template <class N>
struct StandardDeviation {
  N value;
  N slope;  // d value / d output

  UNIGEN_INLINE StandardDeviation(N x, const SpreadOptions& options) {
    if (options.spread == Spread::std && !options.clamped()) {
      value = x;
      slope = constant<N>(1);
    } else {
      const LogVariance<N> logvar(x, options);
      value = exp(constant<N>(0.5) * logvar.value);
      slope = logvar.pull_back(constant<N>(0.5) * value);
    }
  }
};

// A difference d in units of sigma = e^{v / 2}. Of a Gaussian that has become certain e^{-v} is infinite, and d² e^{-v} not a
// number at d = 0: the square of d / sigma is, and 1 / sigma, kept finite, times d.
template <class N>
struct Standardized {
  N rate, value;  // 1 / sigma, d / sigma

  UNIGEN_INLINE Standardized(N difference, N rate) : rate(rate), value(difference * rate) {}

  static UNIGEN_INLINE N rate_of(N logvar) { return finite_exp(constant<N>(-0.5) * logvar); }

  UNIGEN_INLINE N square() const { return value * value; }
  UNIGEN_INLINE N slope() const { return value * rate; }  // d e^{-v}
};

// ½ (e^v - 1 - v + m²): one dimension of KL(N(m, e^v) || N(0, 1))
template <class N>
struct StandardKl {
  N value, d_mean, d_spread;

  UNIGEN_INLINE StandardKl(N mean, N spread, const SpreadOptions& options) {
    const LogVariance<N> logvar(spread, options);
    const ExpTerms<N> e(logvar.value);
    const N half = constant<N>(0.5);
    value = half * (e.minus_1_minus_x + mean * mean);
    d_mean = mean;
    d_spread = logvar.pull_back(half * e.minus_1);
  }
};

// ½ (e^d - 1 - d + (m - m_p)² e^{-v_p}), d = v - v_p. An absent prior spread stands for v_p = 0.
template <class N>
struct PriorKl {
  N value, d_mean, d_spread, d_prior_mean, d_prior_spread;

  UNIGEN_INLINE PriorKl(N mean, N spread, N prior_mean, N prior_spread, bool has_prior_spread, const SpreadOptions& options) {
    const N half = constant<N>(0.5);
    const LogVariance<N> logvar(spread, options);
    LogVariance<N> prior(constant<N>(0), {Spread::logvar, -HUGE_VAL, HUGE_VAL});
    N rate = constant<N>(1);
    if (has_prior_spread) {
      prior = LogVariance<N>(prior_spread, options);
      rate = Standardized<N>::rate_of(prior.value);
    }
    const ExpTerms<N> e(logvar.value - prior.value);
    const Standardized<N> difference(mean - prior_mean, rate);
    value = half * (e.minus_1_minus_x + difference.square());
    d_mean = difference.slope();
    d_spread = logvar.pull_back(half * e.minus_1);
    d_prior_mean = -d_mean;
    d_prior_spread = prior.pull_back(-half * (e.minus_1 + difference.square()));
  }
};

// PriorKl of two log-variances of 0: half the squared error
template <class N>
struct UnitKl {
  N value, d_mean, d_prior_mean;
  N d_spread = constant<N>(0), d_prior_spread = constant<N>(0);

  UNIGEN_INLINE UnitKl(N mean, N prior_mean) {
    d_mean = mean - prior_mean;
    d_prior_mean = -d_mean;
    value = constant<N>(0.5) * (d_mean * d_mean);
  }
};

// in: z (, mean), spread, prior mean, prior spread.
// kMean: log q - log p = 1/2 (v_p - v + (z - m_p)² e^{-v_p} - (z - m)² e^{-v}); else its last term is 1, its expectation.
template <bool kMean>
struct MonteCarloKl : FormulaBase {
  static constexpr bool kWeighted = true;
  static constexpr int kInputs = kMean ? 5 : 4, kSpread = kMean ? 2 : 1;
  SpreadOptions options;

  template <class N>
  struct Terms {
    LogVariance<N> logvar, prior;
    Standardized<N> of_prior, own;  // z - m_p; z - m, or 1

    UNIGEN_INLINE Terms(const N* in, const SpreadOptions& options)
        : logvar(in[kSpread], options),
          prior(in[kSpread + 2], options),
          of_prior(in[0] - in[kSpread + 1], Standardized<N>::rate_of(prior.value)),
          own(own_of(in, logvar.value)) {}

    static UNIGEN_INLINE Standardized<N> own_of(const N* in, N logvar) {
      if constexpr (kMean) return {in[0] - in[1], Standardized<N>::rate_of(logvar)};
      else return {constant<N>(1), constant<N>(1)};
    }
  };

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const Terms<N> t(in, options);
    return constant<N>(0.5) * (t.prior.value - t.logvar.value + t.of_prior.square() - t.own.square());
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const Terms<N> t(in, options);
    const N half = constant<N>(0.5), one = constant<N>(1);
    const N by_prior = t.of_prior.slope();
    out[0] = by_prior;
    N of_logvar = -half;
    if constexpr (kMean) {
      out[1] = t.own.slope();
      out[0] = by_prior - out[1];
      of_logvar = half * (t.own.square() - one);
    }
    out[kSpread] = t.logvar.pull_back(of_logvar);
    out[kSpread + 1] = -by_prior;
    out[kSpread + 2] = t.prior.pull_back(half * (one - t.of_prior.square()));
  }
};

// in: logits a of q (, b of p; else b = 0). KL = sigma(a) (a - b) + softplus(b) - softplus(a). It stays the same where both
// change their signs, so that p = sigma(a) <= 1/2; and near b = a, with u = b - a, it is p (e^u - 1 - u) plus
// log(1 + y) - y of y = p (e^u - 1).
template <bool kPrior>
struct BernoulliKl : FormulaBase {
  static constexpr bool kWeighted = true;
  static constexpr int kInputs = kPrior ? 2 : 1;

  template <class N>
  static UNIGEN_INLINE N prior(const N* in) {
    if constexpr (kPrior) return in[1];
    else return constant<N>(0);
  }

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const N zero = constant<N>(0), one = constant<N>(1);
    const N a = -abs(in[0]), b = select(zero < in[0], -prior(in), prior(in)), u = b - a;
    const N tail = exp_of_distance(a), p = tail / (one + tail);
    const ExpTerms<N> e(u);
    const N near = p * e.minus_1_minus_x + log1p_minus(p * e.minus_1);
    // softplus(b) - p u, without the difference of two infinities
    const N linear = select(p == zero, maximum(b, zero), select(zero < b, (one - p) * b + p * a, -p * u));
    const N far = linear + log1p_unit(exp_of_minus_abs(b)) - log1p_unit(tail);
    return select(abs(u) < one, near, far);
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const N b = prior(in), u = b - in[0];
    const Logistic<N> q(in[0]), p(b);
    const N variance = q.sigmoid() * q.sigmoid_of_minus();
    out[0] = select(variance == constant<N>(0), constant<N>(0), -variance * u);
    if constexpr (kPrior) {
      // sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - e^{-u}) = sigma(-a) - sigma(-b)
      const N near = -p.sigmoid() * q.sigmoid_of_minus() * ExpTerms<N>(-u).minus_1;
      const N far = select(q.positive, q.sigmoid_of_minus() - p.sigmoid_of_minus(), p.sigmoid() - q.sigmoid());
      out[1] = select(abs(u) < constant<N>(1), near, far);
    }
  }
};

}  // namespace unigen
