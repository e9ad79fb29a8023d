// Elementwise terms of Gaussian divergences and of the reparameterised sample.
#pragma once

#include "number.h"

namespace unigen {

enum class Spread : int { logvar, logstd, std };

// What a network's second output means, and the range its log-variance is clamped to (infinite: not at all).
struct SpreadOptions {
  Spread spread;
  double clamp_min, clamp_max;

  UNIGEN_INLINE bool clamped() const { return clamp_min > -HUGE_VAL || clamp_max < HUGE_VAL; }
};

template <class N>
struct LogVariance {
  N value;
  N slope;  // d value / d output; 0 outside the clamp

  UNIGEN_INLINE LogVariance(N x, const SpreadOptions& options) {
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
    if (options.clamped()) {
      const N free = value;
      value = minimum(maximum(free, constant<N>(options.clamp_min)), constant<N>(options.clamp_max));
      slope = select(value == free, slope, constant<N>(0));
    }
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
      slope = constant<N>(0.5) * value * logvar.slope;
    }
  }
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
    d_spread = half * e.minus_1 * logvar.slope;
  }
};

// ½ (e^d - 1 - d + (m - m_p)² e^{-v_p}), d = v - v_p. An absent prior spread stands for v_p = 0.
template <class N>
struct PriorKl {
  N value, d_mean, d_spread, d_prior_mean, d_prior_spread;

  UNIGEN_INLINE PriorKl(N mean, N spread, N prior_mean, N prior_spread, bool has_prior_spread, const SpreadOptions& options) {
    const N half = constant<N>(0.5);
    const LogVariance<N> logvar(spread, options);
    N prior_logvar = constant<N>(0), prior_slope = constant<N>(0);
    if (has_prior_spread) {
      const LogVariance<N> prior(prior_spread, options);
      prior_logvar = prior.value;
      prior_slope = prior.slope;
    }
    const ExpTerms<N> e(logvar.value - prior_logvar);
    const N difference = mean - prior_mean;
    const N scaled = difference * exp(-prior_logvar);
    value = half * (e.minus_1_minus_x + difference * scaled);
    d_mean = scaled;
    d_spread = half * e.minus_1 * logvar.slope;
    d_prior_mean = -scaled;
    d_prior_spread = -half * (e.minus_1 + difference * scaled) * prior_slope;
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
    N difference, scaled;              // z - m_p; e^{-v_p} times that
    N own_difference, own_scaled;      // z - m

    UNIGEN_INLINE Terms(const N* in, const SpreadOptions& options)
        : logvar(in[kSpread], options), prior(in[kSpread + 2], options), difference(in[0] - in[kSpread + 1]) {
      scaled = difference * exp(-prior.value);
      if constexpr (kMean) {
        own_difference = in[0] - in[1];
        own_scaled = own_difference * exp(-logvar.value);
      } else {
        own_difference = own_scaled = constant<N>(1);
      }
    }
  };

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const Terms<N> t(in, options);
    return constant<N>(0.5) *
           (t.prior.value - t.logvar.value + t.difference * t.scaled - t.own_difference * t.own_scaled);
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const Terms<N> t(in, options);
    const N half = constant<N>(0.5), one = constant<N>(1);
    out[0] = t.scaled;
    N of_logvar = -half;
    if constexpr (kMean) {
      out[0] = t.scaled - t.own_scaled;
      out[1] = t.own_scaled;
      of_logvar = half * (t.own_difference * t.own_scaled - one);
    }
    out[kSpread] = of_logvar * t.logvar.slope;
    out[kSpread + 1] = -t.scaled;
    out[kSpread + 2] = half * (one - t.difference * t.scaled) * t.prior.slope;
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
    const N far = softplus(b) - log1p_unit(tail) - select(p == zero, zero, p * u);
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
