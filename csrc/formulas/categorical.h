// Formulas of categorical distributions, class by class, and of the discretized logistic mixture, component by component.
#pragma once

#include "../kernels/categorical.h"
#include "importance.h"
#include "number.h"

namespace unigen {

// q log(q / p) - q + p: what a class has in KL(q || p). The sum is the same without the last two, but so no class is
// negative and nothing cancels where q is close to p; and an error that all the log-ratios share is of second order.
template <class N>
UNIGEN_INLINE N kl_term(N q, N p, N log_ratio) {
  constexpr int last = sizeof(Scalar<N>) == 8 ? 15 : 9;
  const N near = exponential_series<2, last>(-log_ratio) * log_ratio * log_ratio * q;
  const N far = q * log_ratio - (q - p);
  const N zero = constant<N>(0);
  return select(q == zero, p, select(abs(log_ratio) < constant<N>(0.5), near, far));
}

// What to take from the logits of q and p before their differences: 0, or their maxima where those are far apart and the
// differences would lose digits. (Else the difference of logits that are almost equal is the more accurate as it is.)
template <class N>
struct LogitBases {
  N q, p;

  UNIGEN_INLINE LogitBases(N max_q, N max_p) {
    const N zero = constant<N>(0);
    const auto near = abs(max_q - max_p) < constant<N>(8);
    q = select(near, zero, max_q);
    p = select(near, zero, max_p);
  }
};

// ---- the discretized logistic mixture ----------------------------------------------------------------------------------

constexpr double kMinLogScale = -7, kHalfBin = 1.0 / 255, kEdge = 0.999;

template <class N>
struct Tanh {
  N value, slope;

  UNIGEN_INLINE explicit Tanh(N x) {
    const N one = constant<N>(1), two = constant<N>(2), twice = -two * abs(x);
    const N tail = exp(twice), minus = -ExpTerms<N>(twice).minus_1, inverse = one / (one + tail);
    value = select(x < constant<N>(0), -minus, minus) * inverse;
    slope = constant<N>(4) * tail * inverse * inverse;
  }
};

// log of the mass of a logistic in the bin of x, `centered` = x - mean:
// log(1 - e^-width) + log sigma(upper) + log sigma(-lower), without the parts that an edge has no use for.
template <class N>
struct DiscretizedLogistic {
  N value, d_centered, d_log_scale;

  UNIGEN_INLINE DiscretizedLogistic(N x, N centered, N log_scale) {
    const N zero = constant<N>(0), one = constant<N>(1), half = constant<N>(0.5), bound = constant<N>(kMinLogScale);
    const auto below = x < constant<N>(-kEdge), above = constant<N>(kEdge) < x, clamped = log_scale < bound;
    log_scale = maximum(log_scale, bound);
    const N inverse = exp(-log_scale);
    const N upper = inverse * (centered + constant<N>(kHalfBin)), lower = inverse * (centered - constant<N>(kHalfBin));
    const Logistic<N> up(upper), low(lower);
    const N width = inverse * constant<N>(2 * kHalfBin);
    const N mass = -ExpTerms<N>(-width).minus_1;  // 1 - e^-width = width (1 - width / 2 …), and may not be a number for small ones
    const auto narrow = width < constant<N>(1e-4);
    const N product = select(narrow, one, mass) * (up.of_abs * low.of_abs);
    const N rest = select(narrow, constant<N>(-4.848116364598481) - log_scale - half * width, zero);  // log(2 / 255)
    // the linear parts of log sigma(upper) and log sigma(-lower)
    const N linear_up = maximum(-upper, zero), linear_low = maximum(lower, zero);
    const N inside = log(product) + rest - linear_up - linear_low;
    const N edge = -log1p_unit(select(below, up.tail, low.tail)) - select(below, linear_up, linear_low);
    value = select(below, edge, select(above, edge, inside));
    const N of_up = select(above, zero, up.sigmoid_of_minus()), of_low = select(below, zero, low.sigmoid());
    d_centered = inverse * (of_up - of_low);
    const N by_width = select(narrow, one - half * width, width * (one - mass) / mass);
    const N of_width = select(below, zero, select(above, zero, by_width));
    d_log_scale = select(clamped, zero, lower * of_low - upper * of_up - of_width);
  }
};

// One component of the mixture at a pixel of C channels, each channel's mean shifted by those before it.
template <int C, class N>
struct LogisticComponent {
  static_assert(C == 1 || C == 3, "grey or colour");
  static constexpr int kPerChannel = C == 3 ? 3 : 2;  // mean, log-scale (, coefficient)
  static constexpr int kNumbers = C * kPerChannel;

  N value;
  N d_number[kNumbers];  // in the order of `numbers`
  N d_x[C];

  // numbers: kPerChannel for each channel
  UNIGEN_INLINE LogisticComponent(const N* x, const N* numbers) {
    const auto channel = [&](int c, N shift) {
      const N* given = numbers + c * kPerChannel;
      const DiscretizedLogistic<N> term(x[c], x[c] - (given[0] + shift), given[1]);
      value = c == 0 ? term.value : value + term.value;
      d_number[c * kPerChannel] = -term.d_centered;
      d_number[c * kPerChannel + 1] = term.d_log_scale;
      d_x[c] = term.d_centered;
    };
    channel(0, constant<N>(0));
    if constexpr (C == 3) {
      const Tanh<N> first(numbers[2]), second(numbers[5]), third(numbers[8]);
      channel(1, first.value * x[0]);
      channel(2, second.value * x[0] + third.value * x[1]);
      const N by_green = d_number[3], by_blue = d_number[6];
      d_number[2] = by_green * x[0] * first.slope;
      d_number[5] = by_blue * x[0] * second.slope;
      d_number[8] = by_blue * x[1] * third.slope;
      d_x[0] = d_x[0] + by_green * first.value + by_blue * second.value;
      d_x[1] = d_x[1] + by_blue * third.value;
    }
  }
};

}  // namespace unigen
