// Elementwise terms of log-likelihoods and their derivatives.
#pragma once

#include "../kernels/likelihood.h"
#include "divergence.h"
#include "gamma.h"

namespace unigen {

// -log Bernoulli(x; sigma(l)) = linear + log1p(tail): the caller may multiply the factors 1 + tail of many elements
// (each in [1, 2]) and take one logarithm of the product.
template <class N>
struct BernoulliTerms {
  N tail;  // e^{-|l|}; NaN where l is

  UNIGEN_INLINE BernoulliTerms(N l, N x) : tail(exp_of_minus_abs(l)), logit_(l), coefficient_(heaviside(l) - x) {}

  // sum - linear, linear = relu(l) - x·l >= 0: an infinite logit on its own side costs nothing
  UNIGEN_INLINE N less_linear(N sum) const {
    return select(coefficient_ == constant<N>(0), sum, sum - coefficient_ * logit_);
  }
  // d log Bernoulli / d l = x - sigma(l), which cancels nothing for x in {0, 1}: sigma(|l|) is 1 - tail / (1 + tail)
  UNIGEN_INLINE N slope() const {
    return with_sign(tail, logit_) * bounded_reciprocal(constant<N>(1) + tail) - coefficient_;
  }

 private:
  N logit_, coefficient_;  // of linear
};

// d log Bernoulli / d x = l

// in: x, mean, spread. -1/2 (log 2 pi + v + (x - m)² e^{-v})
struct GaussianLogProb : FormulaBase {
  static constexpr int kInputs = 3;
  SpreadOptions options;

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const N logvar = LogVariance<N>(in[2], options).value;
    const Standardized<N> difference(in[0] - in[1], Standardized<N>::rate_of(logvar));
    return constant<N>(-0.5) * (difference.square() + logvar + constant<N>(1.83787706640934548356));
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const LogVariance<N> logvar(in[2], options);
    const Standardized<N> difference(in[0] - in[1], Standardized<N>::rate_of(logvar.value));
    out[1] = difference.slope();
    out[0] = -out[1];
    out[2] = logvar.pull_back(constant<N>(0.5) * (difference.square() - constant<N>(1)));
  }
};

// 1 / b of a log-scale, as the square of what stays finite: products with it are taken one factor at a time
template <class N>
UNIGEN_INLINE N root_of_rate(N log_scale) {
  return finite_exp(constant<N>(-0.5) * log_scale);
}

// in: x, mean, log-scale. -(log 2 b + |x - m| / b)
struct LaplaceLogProb : FormulaBase {
  static constexpr int kInputs = 3;

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const N root = root_of_rate(in[2]);
    return -(abs(in[0] - in[1]) * root * root + in[2] + constant<N>(0.69314718055994530942));
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const N root = root_of_rate(in[2]), inverse = root * root, difference = in[0] - in[1], zero = constant<N>(0);
    const N side = select(difference < zero, -inverse, select(difference == zero, zero, inverse));
    out[0] = -side;
    out[1] = side;
    out[2] = abs(difference) * root * root - constant<N>(1);
  }
};

// in: x, mean, log-scale. log(sigma(a) - sigma(b)) = log(1 - e^{-w}) - softplus(-a) - softplus(b), w = a - b: three terms of
// one sign. The extreme bins go without the first, and without b or a.
struct DiscretizedLogisticLogProb : FormulaBase {
  static constexpr int kInputs = 3;
  static constexpr bool kLarge = true;
  Bins bins;

  template <class N>
  struct Edges {
    N root, width, a, b;
    decltype(N() < N()) lowest, highest;

    UNIGEN_INLINE Edges(const N* in, const Bins& bins) : root(root_of_rate(in[2])) {
      const N half = constant<N>(bins.half), distance = in[0] - in[1];
      width = constant<N>(2) * half * root * root;
      a = (distance + half) * root * root;
      b = (distance - half) * root * root;
      lowest = in[0] < constant<N>(bins.low + bins.half);
      highest = constant<N>(bins.high - bins.half) < in[0];
    }
  };

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const Edges<N> e(in, bins);
    const N zero = constant<N>(0);
    // log(1 - e^{-w}) = log w - w/2 + w²/24 …: the width of a bin may be too small for a number
    const auto tiny = e.width < constant<N>(1e-4);
    const N mass = select(tiny, constant<N>(2 * bins.half), -ExpTerms<N>(-e.width).minus_1);
    const N series = e.width * (e.width * constant<N>(1.0 / 24) - constant<N>(0.5)) - in[2];
    const N narrow = log(mass) + select(tiny, series, zero), wide = log1p(-exp(-e.width));
    N of_width = select(constant<N>(0.69314718055994530942) < e.width, wide, narrow);
    of_width = select(e.lowest, zero, select(e.highest, zero, of_width));
    return of_width - select(e.highest, zero, softplus(-e.a)) - select(e.lowest, zero, softplus(e.b));
  }
  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const Edges<N> e(in, bins);
    const N zero = constant<N>(0);
    const N above = select(e.highest, zero, Logistic<N>(e.a).sigmoid_of_minus());
    const N below = select(e.lowest, zero, Logistic<N>(e.b).sigmoid());
    const N bound = minimum(maximum(e.width, constant<N>(1e-30)), constant<N>(80));  // what is beyond counts as nothing
    N of_width = bound / ExpTerms<N>(bound).minus_1;
    of_width = select(e.lowest, zero, select(e.highest, zero, of_width));
    out[0] = (above - below) * e.root * e.root;
    out[1] = -out[0];
    out[2] = weighted(below, e.b) - weighted(above, e.a) - of_width;
  }
};

// in: x, mu, theta. With N = x + theta, p = theta / (theta + mu), q = 1 - p, after Loader (2000):
//   remainder(N) - remainder(theta) - remainder(x) - 1/2 log(2 pi x N / theta) - deviance
// where the deviance is that of x from N q, plus that of theta from N p: both >= 0, as are the other terms together.
//
// With eps added inside the logarithms, theta log((theta + eps) / (theta + mu + eps)) + x log((mu + eps) / (theta + mu + eps))
// instead of the same without, it is that of the mean mu + eps, plus theta log(1 + eps / theta); of a zero the two cancel for
// a small mu, and -theta log(1 + mu / (theta + eps)) remains. kEps: whether there is one; what it costs, registers among that,
// is then not for those without.
//
// The reciprocals of tiny numbers are infinite. From log NB of tiny mu or theta, raised to `least`, it differs, at x > 0, by
// log(theta / raised) + x log(p' / p' of those raised), p' = mu / (theta + mu).
template <bool kEps>
struct NegativeBinomialLogProb : FormulaBase {
  static constexpr int kInputs = 3;
  static constexpr bool kLarge = true;
  bool data_slope;  // whether the slope in x is wanted
  double eps = 0;

  template <class N>
  UNIGEN_INLINE N and_eps(N x) const {
    if constexpr (kEps) return x + constant<N>(eps);
    else return x;
  }

  template <class N>
  static UNIGEN_INLINE N least() {
    return constant<N>(sizeof(Scalar<N>) == 8 ? 0x1p-500 : 0x1p-60);
  }

  // a log(a / b) - (a - b) >= 0, given the difference a - b and (a - b) / b
  template <class N>
  static UNIGEN_INLINE N deviance(N a, N ratio, N difference, N relative) {
    const auto near = abs(relative - constant<N>(0.25)) < constant<N>(0.75);
    return select(near, relative * difference + a * log1p_minus(relative), a * log(ratio) - difference);
  }

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const N given_mu = and_eps(in[1]), given_theta = in[2], zero = constant<N>(0), least_x = smallest_normal<N>();
    const auto none = in[0] == zero;
    const N x = select(zero < in[0], maximum(in[0], least_x), in[0]);
    const N least_theta = select(none, smallest_normal<N>(), least<N>());
    const N mu = maximum(given_mu, select(none, given_mu, least<N>()));
    const N theta = select(zero < given_theta, maximum(given_theta, least_theta), given_theta);
    const N total = x + theta, inverse = constant<N>(1) / total, over_mu = constant<N>(1) / mu;
    const N difference = x - mu, share = theta * inverse;
    const N ratio = minimum((theta + mu) * inverse, largest<N>());
    const N excess = difference * (theta / (theta + mu));  // x - N q
    const N of_theta = deviance(theta, ratio, -excess, -difference * inverse);
    const N of_x = deviance(x, maximum(x * over_mu * ratio, least_x), excess, difference * over_mu * share);
    const N some = select(none, constant<N>(1), x);
    const N rest = Stirling<N>(total).remainder() - Stirling<N>(theta).remainder() - Stirling<N>(some).remainder() -
                   constant<N>(0.5) * log(constant<N>(6.28318530717958647693) * some / share);
    N value = select(none, zero, rest) - (of_theta + select(none, -excess, of_x));
    if (any(given_theta < theta) || any(given_mu < mu)) {
      const N part = given_mu / mu, sum = given_theta + given_mu, least_rise = constant<N>(-0.5);
      const N rise = (part * theta - given_theta) / sum;  // of p'
      const N log_rise = select(least_rise < rise, log1p(maximum(rise, least_rise)), log(part * ((theta + mu) / sum)));
      value = value + select(none, zero, log(given_theta / theta) + x * log_rise);
    }
    if constexpr (kEps) {
      const N of_eps = theta * log1p(select(none, in[1] / and_eps(theta), constant<N>(eps) / theta));
      return select(none, -of_eps, value + of_eps);
    }
    return value;
  }

  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const N x = in[0], given_mu = and_eps(in[1]), given_theta = in[2], zero = constant<N>(0), one = constant<N>(1);
    const auto none = x == zero;
    // of a zero, and all but the slope in theta of others, only the ratio of mu and theta counts
    const N raise = select(given_theta + given_mu < least<N>(), one / least<N>(), one);
    const N mu = given_mu * raise, theta = given_theta * raise, theta_and_eps = and_eps(given_theta) * raise;
    const N total = x + select(none, theta, given_theta), inverse = one / (theta + mu), share = theta * inverse;
    const N difference = x - select(none, mu, given_mu);
    const Stirling<N> of_total(total), of_theta(theta);
    out[1] = select(none, -share, share * difference / given_mu);
    // t - log(1 + t), t = N / (theta + mu) - 1; of a zero, N = theta + eps
    N relative = difference * inverse, ratio = total * inverse;
    if constexpr (kEps) {
      relative = select(none, -in[1] * raise * inverse, relative);
      ratio = select(none, theta_and_eps * inverse, ratio);
    }
    const auto near = abs(relative - constant<N>(0.25)) < constant<N>(0.75);
    const N of_deviance = select(near, -log1p_minus(relative), relative - log(ratio));
    out[2] = select(none, zero, digamma_minus_log_rise(of_theta, of_total, x)) - of_deviance;
    if constexpr (kEps) {
      // log(1 + eps / theta) - s = -(log(1 - s) + s), s = eps / (theta + eps)
      const N share = constant<N>(eps) * raise / theta_and_eps;
      const auto far = constant<N>(0.5) < share;
      N of_eps = -log1p_minus(-share);
      if (any(far)) of_eps = select(far, log(theta_and_eps / theta) - share, of_eps);
      out[2] = out[2] + select(none, share * relative, of_eps);
    }
    const auto tiny = given_theta < least<N>();
    if (any(tiny)) {
      N of_zero = out[2];
      if constexpr (!kEps)
        of_zero = select(share < constant<N>(1e-9), log(given_theta) - log(given_theta + given_mu) + one, of_zero);
      const N left = select(share < constant<N>(0.5), one - x * share, one - x + x * (mu * inverse));  // 1 - x share
      out[2] = select(tiny, select(none, of_zero, left / given_theta), out[2]);
    }
    out[0] = zero;
    if (data_slope) {
      const N next = x + one;
      // log(N mu / ((x + 1) (theta + mu))); where the mean is next to nothing, of one that is 1 / least times as large
      const N of_mean = mu * inverse;
      const auto faint = of_mean < smallest_normal<N>();
      const N ratio = select(faint, total * inverse * (mu * (one / least<N>()) / next), total / next * of_mean);
      out[0] = of_total.digamma_minus_log() - Stirling<N>(next).digamma_minus_log() + log(ratio) +
               select(faint, log(least<N>()), zero);
      if (any(tiny)) out[0] = select(none, select(tiny, -one / given_theta, out[0]), out[0]);
    }
  }
};

// in: x, mu, theta, gate. 0 with probability sigma(g), NB otherwise.
template <bool kEps>
struct ZeroInflatedNegativeBinomialLogProb : FormulaBase {
  using Counts = NegativeBinomialLogProb<kEps>;
  static constexpr int kInputs = 4;
  static constexpr bool kLarge = true;
  bool data_slope;
  double eps = 0;

  template <class N>
  UNIGEN_INLINE N value(const N* in) const {
    const N gate = in[3], count = Counts{{}, false, eps}.value(in), zero = constant<N>(0);
    const Logistic<N> open(gate);
    // log(sigma(g) + sigma(-g) p) = log1p(-sigma(-g) (1 - p)), but for p and sigma(g) both small
    const N rest = open.sigmoid_of_minus() * ExpTerms<N>(minimum(count, zero)).minus_1;
    const N closed = log1p_unit(open.tail) + maximum(gate, zero);  // -log sigma(-g)
    const N larger = maximum(gate, count), apart = select(gate == count, zero, abs(gate - count));
    const N usual = log1p(maximum(rest, constant<N>(-0.5)));
    const N both = select(rest < constant<N>(-0.5), larger + log1p_unit(exp_of_distance(-apart)) - closed, usual);
    return select(in[0] == zero, both, count - closed);
  }

  template <class N>
  UNIGEN_INLINE void slopes(const N* in, N* out) const {
    const N gate = in[3], mu = in[1], theta = in[2], zero = constant<N>(0);
    const auto none = in[0] == zero;
    const Logistic<N> open(gate);
    const Counts counts{{}, data_slope, eps};
    counts.slopes(in, out);
    // of a zero: how much of it is the count's
    const N empty = -theta * log1p(minimum(mu / counts.and_eps(theta), largest<N>()));
    const Logistic<N> posterior(empty - gate);
    const N weight = select(none, posterior.sigmoid(), constant<N>(1));
    out[0] = select(none, zero, out[0]);
    out[1] = weight * out[1];
    out[2] = weight * out[2];
    out[3] = select(none, -posterior.sigmoid_of_minus() * open.sigmoid_of_minus() * ExpTerms<N>(empty).minus_1,
                    -open.sigmoid());
  }
};

}  // namespace unigen
