// Formulas of one row of K log-weights, given its maximum m and its sums; e_k = exp(t_k - m), t = log-weight / temperature.
#pragma once

#include "../kernels/importance.h"
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

// -sum of w · log-weight, given the sum of the exponentials times it: of a row of -inf as its bound, -(-inf)
template <class T>
UNIGEN_INLINE T minus_surrogate(T sum, T extra) {
  return select(sum == constant<T>(0), constant<T>(HUGE_VAL), -extra * inverse_sum(sum));
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

// d loss / d l of IWGAN's row loss L = sum w~ softplus(-l): -w~ sigma(-l), and with live weights w~ (softplus(-l) - L) / T
template <class N>
UNIGEN_INLINE N iwgan_slope(N l, N weight, bool detach, N row_loss, N inverse_temperature) {
  N slope = -Logistic<N>(l).sigmoid_of_minus();
  if (!detach) slope = slope + (softplus(-l) - row_loss) * inverse_temperature;
  return weighted(weight, slope);
}

// ---- estimators: rows of several sums ----------------------------------------------------------------------------------
//
// An estimator of each row, given its K columns of kIn operands, in several sweeps over them:
//   key(x)                             what the row's reference, its largest (and second-largest) number, is taken of
//   open(largest, second, kept)        the first of the kKept numbers of a row
//   terms(sweep, kept, x, t)           kSums terms of an element; they are summed over the row
//   close(sweep, sums, kept, planes)   after a sweep; `planes`: kSweepPlanes numbers to be saved for backward
//   values(kept, v)                    kValues results of the row
// The first kPlanes kept numbers are saved as well. A sample that is +inf or NaN makes its row's sums NaN.

// e^x - 1
template <class N>
UNIGEN_INLINE N minus_1(N x) {
  return ExpTerms<N>(x).minus_1;
}

struct Estimator {
  static constexpr bool kSecond = false;
  static constexpr int kIn = 1, kPlanes = 2, kSweepPlanes = 0, kValues = 1;
  double count = 1;  // K

  UNIGEN_INLINE int sweeps() const { return 1; }
  template <class N>
  UNIGEN_INLINE N key(const N* x) const {
    return x[0];
  }
  template <class N>
  UNIGEN_INLINE void open(N largest, N, N* kept) const {
    kept[0] = finite_shift(largest);
  }
};

// What the powers of weights are: exponentials, all equal (power 0), or one at the extreme (an infinite power).
enum class PowerKind { exponential, mean, extreme };

struct Power {
  double power;

  UNIGEN_INLINE PowerKind kind() const {
    if (power == 0) return PowerKind::mean;
    return power - power == 0 ? PowerKind::exponential : PowerKind::extreme;
  }
  // of a log-weight, relative to that of `base`
  template <class N>
  UNIGEN_INLINE N weight(N log_w, N base) const {
    if (kind() == PowerKind::mean) return constant<N>(1);
    if (kind() == PowerKind::extreme) {
      const N one = select(log_w == base, constant<N>(1), constant<N>(0));
      return select(log_w == log_w, one, log_w);
    }
    return exp_of_distance((log_w - base) * constant<N>(power));
  }
};

// elbo_weight · mean l + (1 - elbo_weight) · (1/power) log mean exp(power · l)
struct PowerBound : Estimator {
  static constexpr int kSums = 3, kKept = 5;  // base, total, mean l - base, sum of expm1, -inf or 0
  Power power;
  double elbo_weight;

  // whether 1/power would magnify the rounding of a logarithm
  UNIGEN_INLINE bool small() const { return power.power < 0.5 && -power.power < 0.5; }

  template <class N>
  UNIGEN_INLINE N key(const N* x) const {
    return power.power < 0 ? -x[0] : x[0];
  }
  template <class N>
  UNIGEN_INLINE void open(N largest, N, N* kept) const {
    const N base = power.power < 0 ? -largest : largest;
    kept[0] = finite_shift(base);
    kept[4] = select(base == constant<N>(-HUGE_VAL), base, constant<N>(0));
  }
  template <class N>
  UNIGEN_INLINE void terms(int, const N* kept, const N* x, N* t) const {
    const N log_w = select(x[0] == constant<N>(HUGE_VAL), constant<N>(NAN), x[0]);
    const N distance = log_w - kept[0];
    t[0] = power.weight(log_w, kept[0]);
    t[1] = elbo_weight != 0 || power.kind() == PowerKind::mean ? distance : constant<N>(0);
    t[2] = small() && power.kind() == PowerKind::exponential ? minus_1(distance * constant<N>(power.power)) : constant<N>(0);
  }
  template <class N>
  UNIGEN_INLINE void close(int, const N* sums, N* kept, N*) const {
    // a NaN stays; no index that is not constant, for sums are in registers
    N none = select(sums[0] == sums[0], constant<N>(0), sums[0]);
    if (power.kind() == PowerKind::mean) none = select(sums[1] == sums[1], constant<N>(0), sums[1]);
    kept[1] = select(kept[4] == constant<N>(0), sums[0], none);
    kept[2] = sums[1] * constant<N>(1 / count);
    kept[3] = sums[2];
  }
  template <class N>
  UNIGEN_INLINE void values(const N* kept, N* v) const {
    const N total = kept[1];
    N bound;
    if (power.kind() == PowerKind::mean) {
      bound = kept[2];
    } else if (power.kind() == PowerKind::extreme) {
      bound = total - total;
    } else {
      bound = log(total) - N(Scalar<N>(::log(count)));
      if (small()) {
        const N excess = kept[3] * constant<N>(1 / count), least = constant<N>(-0.5);
        bound = select(least < excess, log1p(maximum(excess, least)), bound);
      }
      bound = bound * constant<N>(1 / power.power);
    }
    if (elbo_weight != 0) bound = bound + constant<N>(elbo_weight) * (kept[2] - bound);
    v[0] = select(total == constant<N>(0), kept[4], kept[0] + bound);
  }
};

// left Riemann sum over a partition of [0, 1] of the mean of l under the weights softmax(b l)
struct Tvo : Estimator {
  static constexpr int kSums = 2, kPlanes = 1, kKept = 3, kSweepPlanes = 2;  // base, sum, -inf or 0
  const double* partition;
  int points;

  UNIGEN_INLINE int sweeps() const { return points - 1; }
  UNIGEN_INLINE double width(int sweep) const { return partition[sweep + 1] - partition[sweep]; }

  template <class N>
  UNIGEN_INLINE void open(N largest, N, N* kept) const {
    kept[0] = finite_shift(largest);
    kept[1] = constant<N>(0);
    kept[2] = select(largest == constant<N>(-HUGE_VAL), largest, constant<N>(0));
  }
  template <class N>
  UNIGEN_INLINE void terms(int sweep, const N* kept, const N* x, N* t) const {
    const N distance = x[0] - kept[0];
    if (partition[sweep] == 0) {
      t[0] = constant<N>(1);
      t[1] = distance;
    } else {
      t[0] = exp_of_distance(distance * constant<N>(partition[sweep]));
      t[1] = weighted(t[0], distance);
    }
  }
  template <class N>
  UNIGEN_INLINE void close(int sweep, const N* sums, N* kept, N* planes) const {
    const N zero = constant<N>(0);
    planes[0] = select(kept[2] == zero, sums[0], zero);
    planes[1] = select(sums[0] == zero, zero, sums[1] / sums[0]);
    kept[1] = kept[1] + planes[1] * constant<N>(width(sweep));
  }
  template <class N>
  UNIGEN_INLINE void values(const N* kept, N* v) const {
    v[0] = -(kept[0] + kept[2] + kept[1]);
  }
  // what a sweep adds to d value / d l: `inverse` of its sum, `mean` of l - base
  template <class N>
  UNIGEN_INLINE N slope(int sweep, N distance, N inverse, N mean) const {
    const double beta = partition[sweep];
    if (beta == 0) return constant<N>(-width(sweep)) * inverse;
    const N weight = exp_of_distance(distance * constant<N>(beta)) * inverse * constant<N>(-width(sweep));
    return weighted(weight, constant<N>(1) + (distance - mean) * constant<N>(beta));
  }
};

// What a sample adds to the bound: LME - LME with its log-weight replaced by the mean of the others.
template <class N>
struct VimcoSignal {
  // base; 1 / sum of exponentials, 0 in a row of -inf; sum of the finite l - base; how many are -inf; the signal of the
  // largest, NaN if it is not the only one
  N base, inverse, drop, missing, best;

  UNIGEN_INLINE N operator()(N log_w, double count) const {
    const N zero = constant<N>(0), lowest = constant<N>(-HUGE_VAL);
    const auto impossible = log_w == lowest;
    const N distance = log_w - base;
    const N of_others = (drop - select(impossible, zero, distance)) * constant<N>(1 / (count - 1));
    const N baseline = select(zero < missing - select(impossible, constant<N>(1), zero), lowest, of_others);
    const N gap = select(distance == baseline, zero, distance - baseline);
    const N change = exp_of_distance(larger(distance, baseline)) * minus_1(-abs(gap)) * inverse;
    const N rest = -log1p(select(gap < zero, -change, change));
    return select(log_w == base, select(best == best, best, rest), rest);
  }

 private:
  static UNIGEN_INLINE N larger(N a, N b) { return select(a < b, b, a); }
};

// in: log_w, log_q
struct Vimco : Estimator {
  static constexpr bool kSecond = true;
  static constexpr int kIn = 2, kSums = 3, kPlanes = 5, kKept = 8;  // base, total, drop, missing, best; second (then
                                                                           // 1 / total), and not made finite; sum

  UNIGEN_INLINE int sweeps() const { return 2; }

  template <class N>
  UNIGEN_INLINE void open(N largest, N second, N* kept) const {
    kept[0] = finite_shift(largest);
    kept[4] = select(second < largest, largest, constant<N>(NAN));  // for now the largest, if it is the only one
    kept[5] = finite_shift(second);
    kept[6] = second;
  }
  template <class N>
  UNIGEN_INLINE void terms(int sweep, const N* kept, const N* x, N* t) const {
    const N zero = constant<N>(0);
    t[1] = t[2] = zero;
    if (sweep == 0) {
      const auto impossible = x[0] == constant<N>(-HUGE_VAL);
      t[0] = select(x[0] == kept[4], zero, exp_of_distance(x[0] - kept[5]));
      t[1] = select(impossible, zero, x[0] - kept[0]);
      t[2] = select(impossible, constant<N>(1), zero);
    } else {
      const VimcoSignal<N> signal = {kept[0], kept[5], kept[2], kept[3], kept[4]};
      t[0] = weighted(signal(x[0], count), x[1]);
    }
  }
  // The sum over all but the largest is relative to the second: it does not vanish beside the largest.
  template <class N>
  UNIGEN_INLINE void close(int sweep, const N* sums, N* kept, N*) const {
    if (sweep == 1) {
      kept[7] = sums[0];
      return;
    }
    const N zero = constant<N>(0), one = constant<N>(1), base = kept[0], others = sums[0];
    const auto only = kept[4] == kept[4];
    const N total = select(only, one + others * exp(kept[6] - base), others) + (base - base);
    const N mean = select(zero < sums[2], constant<N>(-HUGE_VAL), sums[1] * constant<N>(1 / (count - 1)));
    const N change = minus_1(mean) / total, step = base - kept[5], least = constant<N>(-0.75);
    const N direct = step + log(total) - log(others + exp(mean + step));
    const N best = select(change < least, direct, -log1p(maximum(change, least)));
    kept[4] = select(only, best, constant<N>(NAN));
    kept[1] = total;
    kept[2] = sums[1];
    kept[3] = sums[2];
    kept[5] = inverse_sum(total);
  }
  template <class N>
  UNIGEN_INLINE void values(const N* kept, N* v) const {
    v[0] = -log_mean(kept[0], kept[1], count) - kept[7];
  }
};

// The sum of the exponentials of what `Self` takes for the log-weight, and theirs with the second input.
template <class Self>
struct SumOfSecond : Estimator {
  static constexpr int kIn = 2, kSums = 2, kKept = 3;  // shift, sum, sum of e · second input

  template <class N>
  UNIGEN_INLINE void terms(int, const N* kept, const N* x, N* t) const {
    t[0] = exp_of_distance(static_cast<const Self*>(this)->key(x) - kept[0]);
    t[1] = weighted(t[0], x[1]);
  }
  template <class N>
  UNIGEN_INLINE void close(int, const N* sums, N* kept, N*) const {
    kept[1] = sums[0];
    kept[2] = sums[1];
  }
};

// in: log_p, log_q
struct Rws : SumOfSecond<Rws> {
  static constexpr int kValues = 2;

  template <class N>
  UNIGEN_INLINE N key(const N* x) const {
    return x[0] - x[1];
  }
  template <class N>
  UNIGEN_INLINE void values(const N* kept, N* v) const {
    v[0] = -log_mean(kept[0], kept[1], count);
    v[1] = -(kept[2] * inverse_sum(kept[1]));
  }
};

// in: log_w, payload
struct WeightedSum : SumOfSecond<WeightedSum> {
  double temperature;

  template <class N>
  UNIGEN_INLINE N key(const N* x) const {
    return temperature == 1 ? x[0] : x[0] / constant<N>(temperature);
  }
  template <class N>
  UNIGEN_INLINE void values(const N* kept, N* v) const {
    v[0] = kept[2] * inverse_sum(kept[1]);
  }
};

struct HalfVariance : Estimator {
  static constexpr int kSums = 1, kKept = 3;  // base, mean - base, sum of squares

  UNIGEN_INLINE int sweeps() const { return 2; }

  template <class N>
  UNIGEN_INLINE void terms(int sweep, const N* kept, const N* x, N* t) const {
    const N distance = x[0] - kept[0], deviation = distance - kept[1];
    t[0] = sweep == 0 ? distance : deviation * deviation;
  }
  template <class N>
  UNIGEN_INLINE void open(N largest, N, N* kept) const {
    kept[0] = finite_shift(largest);
    kept[1] = constant<N>(0);
  }
  template <class N>
  UNIGEN_INLINE void close(int sweep, const N* sums, N* kept, N*) const {
    if (sweep == 0) {
      kept[1] = sums[0] * constant<N>(1 / count);
    } else {
      kept[2] = sums[0];
    }
  }
  template <class N>
  UNIGEN_INLINE void values(const N* kept, N* v) const {
    v[0] = kept[2] * constant<N>(0.5 / (count - 1));
  }
};

// log-mean-exp, effective sample size, largest weight, entropy: saved, they are the result
struct Diagnostics : Estimator {
  static constexpr int kSums = 3, kPlanes = 4, kKept = 4, kValues = 0;

  template <class N>
  UNIGEN_INLINE void terms(int, const N* kept, const N* x, N* t) const {
    const N distance = x[0] - kept[0];
    t[0] = exp_of_distance(distance);
    t[1] = t[0] * t[0];
    t[2] = weighted(t[0], distance);
  }
  template <class N>
  UNIGEN_INLINE void close(int, const N* sums, N* kept, N*) const {
    kept[0] = log_mean(kept[0], sums[0], count);
    kept[1] = effective_samples(sums[0], sums[1]);
    kept[2] = inverse_sum(sums[0]);
    kept[3] = select(sums[0] == constant<N>(0), constant<N>(0), log(sums[0]) - sums[2] * kept[2]);
  }
  template <class N>
  UNIGEN_INLINE void values(const N*, N*) const {}
};

// ---- their gradients -----------------------------------------------------------------------------------------------------
//
//   prepare(operands, row)   kKept numbers of a row from the kGiven gradients (and the value) and kPlanes saved planes
//   f(row, in, out)          kOut gradients of an element's kIn operands

struct Slope {
  static constexpr bool kGivenValue = false;  // whether the value is given, behind the gradient
  static constexpr int kGiven = 1, kPlanes = 2, kIn = 1, kOut = 1, kKept = 3;
  double factor;
};

struct PowerSlope : Slope {
  Power power;
  double elbo_weight, count;

  template <class N>
  UNIGEN_INLINE void prepare(const N* operands, N* row) const {
    const N grad = operands[0] * constant<N>(factor);
    row[0] = grad * constant<N>(1 - elbo_weight) * inverse_sum(operands[2]);
    row[1] = operands[1];
    row[2] = select(operands[2] == constant<N>(0), constant<N>(0), grad * constant<N>(elbo_weight / count));
  }
  template <class N>
  UNIGEN_INLINE void operator()(const N* row, const N* in, N* out) const {
    out[0] = weighted(row[0], power.weight(in[0], row[1])) + row[2];
  }
};

struct VimcoSlope : Slope {
  static constexpr int kPlanes = 5, kOut = 2, kKept = 7;
  double count;

  template <class N>
  UNIGEN_INLINE void prepare(const N* operands, N* row) const {
    for (int k = 0; k < 5; ++k) row[k] = operands[k + 1];
    row[1] = inverse_sum(row[1]);
    row[5] = operands[0] * constant<N>(-factor);
    row[6] = row[5] * row[1];
  }
  template <class N>
  UNIGEN_INLINE void operator()(const N* row, const N* in, N* out) const {
    out[0] = row[6] * exp_of_distance(in[0] - row[0]);
    const VimcoSignal<N> signal = {row[0], row[1], row[2], row[3], row[4]};
    out[1] = row[5] * signal(in[0], count);
  }
};

struct RwsSlope : Slope {
  static constexpr int kGiven = 2, kIn = 2, kOut = 2;

  template <class N>
  UNIGEN_INLINE void prepare(const N* operands, N* row) const {
    const N inverse = constant<N>(-factor) * inverse_sum(operands[3]);
    row[0] = weighted(operands[0], inverse);
    row[1] = weighted(operands[1], inverse);
    row[2] = operands[2];
  }
  template <class N>
  UNIGEN_INLINE void operator()(const N* row, const N* in, N* out) const {
    const N e = exp_of_distance(in[0] - in[1] - row[2]);
    out[0] = weighted(row[0], e);
    out[1] = weighted(row[1], e);
  }
};

struct VarianceSlope : Slope {
  double count;

  template <class N>
  UNIGEN_INLINE void prepare(const N* operands, N* row) const {
    row[0] = operands[0] * constant<N>(factor / (count - 1));
    row[1] = operands[1];
    row[2] = operands[2];
  }
  template <class N>
  UNIGEN_INLINE void operator()(const N* row, const N* in, N* out) const {
    out[0] = row[0] * ((in[0] - row[1]) - row[2]);
  }
};

struct WeightedSumSlope : Slope {
  static constexpr bool kGivenValue = true;
  static constexpr int kGiven = 2, kIn = 2, kOut = 2;
  WeightedSum sum;

  template <class N>
  UNIGEN_INLINE void prepare(const N* operands, N* row) const {
    row[0] = operands[0] * inverse_sum(operands[3]);
    row[1] = operands[2];
    row[2] = operands[1];
  }
  template <class N>
  UNIGEN_INLINE void operator()(const N* row, const N* in, N* out) const {
    out[1] = row[0] * exp_of_distance(sum.key(in) - row[1]);
    out[0] = weighted(out[1], (in[1] - row[2]) * constant<N>(1 / sum.temperature));
  }
};

// body(estimator) with the one that is asked for; `partition`: where the device can read it
template <class Body>
auto with_estimator(const EstimatorOptions& o, double count, const double* partition, const Body& body) {
  switch (o.kind) {
    case EstimatorKind::tvo: return body(Tvo{{count}, partition, o.points});
    case EstimatorKind::vimco: return body(Vimco{{count}});
    case EstimatorKind::rws: return body(Rws{{{count}}});
    case EstimatorKind::log_variance: return body(HalfVariance{{count}});
    case EstimatorKind::weighted_sum: return body(WeightedSum{{{count}}, o.temperature});
    case EstimatorKind::diagnostics: return body(Diagnostics{{count}});
    default: return body(PowerBound{{count}, {o.power}, o.elbo_weight});
  }
}

// body(slope) with the gradient that is asked for; that of tvo, a sum over its sweeps, is in Tvo
template <class Body>
auto with_slope(const EstimatorOptions& o, double count, double factor, const Body& body) {
  switch (o.kind) {
    case EstimatorKind::vimco: return body(VimcoSlope{{factor}, count});
    case EstimatorKind::rws: return body(RwsSlope{{factor}});
    case EstimatorKind::log_variance: return body(VarianceSlope{{factor}, count});
    case EstimatorKind::weighted_sum: return body(WeightedSumSlope{{factor}, {{{count}}, o.temperature}});
    default: return body(PowerSlope{{factor}, {o.power}, o.elbo_weight, count});
  }
}

// ---- the generalised Pareto distribution of a tail ---------------------------------------------------------------------

// The M largest log-weights, descending, and the one that follows: those above the latter make the tail, x = w - cutoff.
struct ParetoTail {
  double top, cutoff, least;

  UNIGEN_INLINE ParetoTail(double largest, double following) : top(largest == -HUGE_VAL ? 0 : largest) {
    const double lowest = -708.39641853226408;  // the logarithm of the smallest normal number
    cutoff = following - top < lowest ? lowest : following - top;
    least = exp(cutoff);
  }
  UNIGEN_INLINE bool counts(double log_w) const { return log_w - top > cutoff; }
  UNIGEN_INLINE double excess(double log_w) const { return counts(log_w) ? exp(log_w - top) - least : 0; }

  // of n >= kLeastTail descending numbers the one at the first quartile
  static UNIGEN_INLINE int64_t quartile(int64_t n) { return n - int64_t(double(n) / 4 + 0.5); }
  // where point g of them stands, between 1 - … and 0
  static UNIGEN_INLINE double place(int64_t g, int64_t points) { return 1 - ::sqrt(double(points) / (double(g) + 0.5)); }
  // with `shape` the mean of log(1 - b x)
  template <class N>
  static UNIGEN_INLINE N log_likelihood(N b, N shape, double n) {
    return constant<N>(n) * (log(-b / shape) - shape - constant<N>(1));
  }
  // the weak prior of Vehtari et al.
  static UNIGEN_INLINE double with_prior(double shape, double n) { return (n * shape + 5) / (n + 10); }
  static UNIGEN_INLINE double least_share() { return 10 * 2.220446049250313e-16; }
};

}  // namespace unigen
