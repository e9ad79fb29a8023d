// Functions of a squared distance, and the weights of the pairs of a minibatch.
#pragma once

#include "../kernels/pairwise.h"
#include "number.h"

namespace unigen {

// 2^x for x < 200; 0 where that is tiny
UNIGEN_INLINE float exp2_bounded(float x) { return ::exp2f(x); }
UNIGEN_INLINE double exp2_bounded(double x) { return ::exp2(x); }

// Exponents are powers of 2: an exponential is then a rounding, a polynomial and a shift. With r = e^{-logvar / 2} s and
// t = (z - mean) r, s² = log2(e) / 2: log2 N(z; mean, e^logvar) = peak - t².
constexpr double kLn2 = 0.69314718055994530942, kLog2Pi = 1.83787706640934548356;
constexpr double kHalfLog2e = 0.72134752044448170368;  // s²
constexpr double kRootHalfLog2e = 0.84932180028801904272;

// 1 / sigma of a posterior that has become certain is kept so small that t is finite and t² is not: its weight is 0, and
// 0 times t is 0.
template <class N>
UNIGEN_INLINE N most_rate() {
  return constant<N>(sizeof(Scalar<N>) == 8 ? 1e300 : 1e30);
}

template <class N>
struct ScaledGaussian {
  N rate, peak;

  UNIGEN_INLINE explicit ScaledGaussian(N logvar)
      : rate(minimum(finite_exp(constant<N>(-0.5) * logvar) * constant<N>(kRootHalfLog2e), most_rate<N>())),
        peak(constant<N>(-kHalfLog2e) * (logvar + constant<N>(kLog2Pi))) {}
};

// With G = d loss / d log N(z; mean, e^logvar): d loss / d mean = -d loss / d z = G t · kMeanSlope r, and
// d loss / d logvar = (G t² - G kPeakShare) kLn2.
constexpr double kMeanSlope = 2 * kLn2;
constexpr double kPeakShare = kHalfLog2e;  // 1/2 over kLn2

// Backward divides the densities of a column by their sum, whose logarithm forward has kept. Beyond this (powers of 2) the
// logarithm's own rounding is seen in the quotient: maximum and sum are then taken again, of the very densities.
constexpr double kFarMarginal = 128;

template <class T>
UNIGEN_INLINE bool far_marginal(T log2_marginal) {
  return fabs(log2_marginal) > T(kFarMarginal) && fabs(log2_marginal) < T(HUGE_VAL);
}

template <class T>
UNIGEN_INLINE void keep_shift(double shift, T* row, int64_t stride) {
  for (int k = 0; k < kShiftRows; ++k) {
    row[k * stride] = T(shift);
    shift -= double(row[k * stride]);
  }
}
template <class T>
UNIGEN_INLINE double kept_shift(const T* row, int64_t stride) {
  return double(row[0]) + (double(row[stride]) + double(row[2 * stride]));
}

// The gradients of the terms that a row of log-densities is made of, from those of the six rows.
struct RowSlopes {
  double joint, marginals, own, prior;  // of log q(z), log prod q(z_d), log q(z|x), log p(z)

  UNIGEN_INLINE explicit RowSlopes(const double* grads)
      : joint(grads[0] - grads[3] + grads[4]),
        marginals(grads[1] - grads[4] + grads[5]),
        own(grads[2] + grads[3]),
        prior(-grads[5]) {}

  UNIGEN_INLINE bool none() const { return joint == 0 && marginals == 0 && own == 0 && prior == 0; }
};

// C/(C + d²) or e^{-d²/C}, and its derivative with respect to d². `parameter`: C, or 1/C.
template <class N>
struct KernelTerm {
  N value, slope;

  UNIGEN_INLINE KernelTerm(N square_distance, PairKernel kernel, N parameter) {
    if (kernel == PairKernel::imq) {
      const N inverse = reciprocal(parameter + square_distance);
      value = parameter * inverse;
      slope = -value * inverse;
    } else {
      value = exp(-square_distance * parameter);
      slope = -parameter * value;
    }
  }
};

}  // namespace unigen
