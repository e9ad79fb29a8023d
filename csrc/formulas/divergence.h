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

}  // namespace unigen
