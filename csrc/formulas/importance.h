// Formulas of one row of K log-weights, given its maximum m and its sums; e_k = exp(t_k - m), t = log-weight / temperature.
#pragma once

#include "number.h"

namespace unigen {

// the shift that keeps exponentials finite: 0 for a row of -inf, so that its sum is 0 and not NaN
template <class T>
UNIGEN_INLINE T finite_shift(T maximum) {
  return select(maximum == constant<T>(-HUGE_VAL), constant<T>(0), maximum);
}

// log (1/K) sum exp, given log K; -inf where the sum is 0
template <class T>
UNIGEN_INLINE T log_mean_given(T shift, T sum, T log_count) {
  return shift + log(sum) - log_count;
}

template <class T>
UNIGEN_INLINE T log_mean(T shift, T sum, double count) {
  return log_mean_given(shift, sum, T(::log(count)));
}

// 1 / sum of the exponentials, 0 where it is 0: then every weight, and every gradient, is 0
template <class T>
UNIGEN_INLINE T inverse_sum(T sum) {
  return select(sum == constant<T>(0), constant<T>(0), constant<T>(1) / sum);
}

// (sum w)² / sum w²
template <class T>
UNIGEN_INLINE T effective_samples(T sum, T squares) {
  return select(sum == constant<T>(0), constant<T>(0), sum * sum / squares);
}

// what a row's weights multiply: nothing, the log-weight itself, or IWGAN's softplus(-l)
enum class Payload : int { none, identity, softplus_of_minus };

template <Payload P, class N>
UNIGEN_INLINE N payload(N x) {
  if constexpr (P == Payload::identity) return x;
  if constexpr (P == Payload::softplus_of_minus) return softplus(-x);
  return constant<N>(0);
}

// weight · payload, in which a weight of 0 silences an infinite payload
template <class N>
UNIGEN_INLINE N weighted(N weight, N payload) {
  return select(weight == constant<N>(0), constant<N>(0), weight * payload);
}

// d loss / d l of IWGAN's row loss L = sum w~ softplus(-l): -w~ sigma(-l), and with live weights w~ (softplus(-l) - L) / T
template <class N>
UNIGEN_INLINE N iwgan_slope(N l, N weight, bool detach, N row_loss, N inverse_temperature) {
  N slope = -Logistic<N>(l).sigmoid_of_minus();
  if (!detach) slope = slope + (softplus(-l) - row_loss) * inverse_temperature;
  return weighted(weight, slope);
}

}  // namespace unigen
