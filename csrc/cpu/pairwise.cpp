// Kernels over all pairs of a minibatch.
#include "../formulas/pairwise.h"

#include <cmath>

#include "pairwise.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// ---- total correlation -----------------------------------------------------------------------------------------------

template <class T>
struct Posteriors {
  using V = Vec<T>;

  int64_t rows, cols, padded;  // padded: the rows as whole vectors
  PairWeights weights;
  Staged<T> z, mean, rate, peak;
  Numbers<double> peaks;  // [rows]: the sum over the columns
  Numbers<T> highest;     // [cols]: the highest peak: no log-density lies above it

  template <class Arguments>
  Posteriors(const Arguments& a, const Parallel& parallel)
      : rows(a.rows), cols(a.cols), padded(round_up(rows, V::size)), weights(a.weights), z(rows, cols), mean(rows, cols),
        rate(rows, cols), peak(rows, cols), peaks(numbers<double>(z.stride)), highest(numbers<T>(cols)) {
    stage_points(z, a.z, a.dtype, parallel);
    stage_points(mean, a.mean, a.dtype, parallel);
    stage_points(peak, a.logvar, a.dtype, parallel);
    z.pad_with_last();
    mean.pad(T(0));
    peak.pad(T(0));
    in_parallel(parallel, cols, grain_of(rows / 4), [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) {
        V bound(T(-HUGE_VAL));
        for (int64_t j = 0; j < padded; j += V::size) {
          const ScaledGaussian<V> gaussian(load(peak.at(d, j)));
          store(rate.at(d, j), gaussian.rate);
          store(peak.at(d, j), gaussian.peak);
        }
        std::fill(peak.at(d, rows), peak.at(d, padded), T(-HUGE_VAL));  // no such point
        for (int64_t j = 0; j < padded; j += V::size) bound = max(load(peak.at(d, j)), bound);
        const T top = lane_max(bound);
        highest[d] = std::isfinite(top) ? top : T(0);
      }
    });
    std::fill(peaks.get(), peaks.get() + rows, 0.0);
    std::fill(peaks.get() + rows, peaks.get() + padded, -HUGE_VAL);
    for (int64_t d = 0; d < cols; ++d)
      for (int64_t j = 0; j < rows; ++j) peaks[j] += double(*peak.at(d, j));
  }

  // whether a vector of points j has a pair with one of the rows i … whose weight is not that of most pairs
  UNIGEN_INLINE bool weighted(int64_t i, int64_t j) const {
    if (weights.uniform()) return false;
    if (weights.columns) return j < 2;
    return (j + V::size > i && j <= i + kPairRows) || (j == 0 && i + kPairRows >= rows);
  }
  UNIGEN_INLINE V weight(int64_t i, int64_t j) const {
    const int64_t next = weights.columns ? 1 : i + 1 < rows ? i + 1 : 0;
    const V following = select(lanes_at<T>(next, j), constant<V>(weights.following), constant<V>(1));
    const bool replaced = weights.columns && i + 2 == rows;
    return select(lanes_at<T>(weights.columns ? 0 : i, j), V(T(replaced ? weights.following : weights.diagonal)), following);
  }

  // log2 of the joint densities of rows i … and a stretch of points, from their squared distances, in place
  UNIGEN_INLINE void joint(int64_t i, int64_t j, int n, double (*squares)[kStretch]) const {
    square_distances<T, true>(z, i, mean, &rate, j, n, squares);
    for (int k = 0; k < kPairRows; ++k) {
      for (int at = 0; at < n; at += Vec<double>::size)
        store(squares[k] + at, load(peaks.get() + j + at) - load(squares[k] + at));
    }
  }

  // totals[k] = sum over j of W 2^{log2 density in column d - shift[k]}
  UNIGEN_INLINE void marginal(int64_t d, int64_t i, const T* shift, double* totals) const {
    const T *points = z.at(d, i), *m = mean.at(d), *r = rate.at(d), *p = peak.at(d);
    for (int k = 0; k < kPairRows; ++k) totals[k] = 0;
    for (int64_t first = 0; first < padded; first += kFlush * V::size) {
      const int64_t last = smaller(padded, first + kFlush * V::size);
      V sum[kPairRows];
      for (int k = 0; k < kPairRows; ++k) sum[k] = V(T(0));
      for (int64_t j = first; j < last; j += V::size) {
        const V center = load(m + j), scale = load(r + j), top = load(p + j);
        if (__builtin_expect(weighted(i, j), false)) {
          for (int k = 0; k < kPairRows; ++k) {
            const V t = (V(points[k]) - center) * scale;
            sum[k] = sum[k] + exp2_bounded(top - t * t - V(shift[k])) * weight(i + k, j);
          }
        } else {
          for (int k = 0; k < kPairRows; ++k) {
            const V t = (V(points[k]) - center) * scale;
            sum[k] = sum[k] + exp2_bounded(top - t * t - V(shift[k]));
          }
        }
      }
      for (int k = 0; k < kPairRows; ++k) totals[k] += lane_sum(sum[k]);
    }
  }

  // the highest log2 density in column d of each row; 0 if there is none
  UNIGEN_NOINLINE void maxima(int64_t d, int64_t i, T* shift) const {
    for (int k = 0; k < kPairRows; ++k) {
      V top(T(-HUGE_VAL));
      for (int64_t j = 0; j < padded; j += V::size) {
        const V t = (V(*z.at(d, i + k)) - load(mean.at(d, j))) * load(rate.at(d, j));
        top = max(load(peak.at(d, j)) - t * t, top);
      }
      const T found = lane_max(top);
      shift[k] = std::isfinite(found) ? found : T(0);
    }
  }

  // far marginals of a column: their maximum for a divisor, and slopes divided by the sum that belongs to it
  UNIGEN_INLINE void renew(int64_t d, int64_t i, T* marginal, T* slope) const {
    bool far = false;
    for (int k = 0; k < kPairRows; ++k) far = far || far_marginal(marginal[k]);
    if (__builtin_expect(!far, true)) return;
    alignas(kVectorBytes) T own[kPairRows];
    alignas(kVectorBytes) double totals[kPairRows];
    maxima(d, i, own);
    this->marginal(d, i, own, totals);
    for (int k = 0; k < kPairRows; ++k) {
      if (!far_marginal(marginal[k])) continue;
      marginal[k] = own[k];
      slope[k] = T(double(slope[k]) / totals[k]);
    }
  }
};

// A sum of exponentials below this is taken again with the row's own maximum for a shift, instead of the bound that serves
// all rows: what lies far below the shift has rounded exponents.
constexpr double kLeastTotal = 0x1p-20;

template <class T>
void total_correlation_in(const TotalCorrelation& a, const Parallel& parallel) {
  using V = Vec<T>;
  const Posteriors<T> posteriors(a, parallel);
  const int64_t rows = a.rows, cols = a.cols;
  T* const statistics = static_cast<T*>(a.statistics);
  const double log_most = std::log(a.weights.most);
  const int64_t blocks = ceil_div(rows, kPairRows);
  in_parallel(parallel, blocks, grain_of(rows * cols), [&](int64_t begin, int64_t end) {
    alignas(kVectorBytes) double squares[kPairRows][kStretch];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block * kPairRows;
      const int valid = int(smaller(kPairRows, rows - i));

      double log_prod[kPairRows] = {}, log_pz[kPairRows] = {};
      for (int64_t d = 0; d < cols; ++d) {
        alignas(kVectorBytes) T shift[kPairRows];
        alignas(kVectorBytes) double totals[kPairRows], again[kPairRows];
        for (int k = 0; k < kPairRows; ++k) shift[k] = posteriors.highest[d];
        posteriors.marginal(d, i, shift, totals);
        bool low = false;
        for (int k = 0; k < kPairRows; ++k) low = low || totals[k] < kLeastTotal;
        if (__builtin_expect(low, false)) {
          T own[kPairRows];
          posteriors.maxima(d, i, own);
          for (int k = 0; k < kPairRows; ++k) shift[k] = totals[k] < kLeastTotal ? own[k] : shift[k];
          posteriors.marginal(d, i, shift, again);
          for (int k = 0; k < kPairRows; ++k) totals[k] = again[k];
        }
        for (int k = 0; k < kPairRows; k += Vec<double>::size)
          store(totals + k, log(load(totals + k)));
        for (int k = 0; k < valid; ++k) {
          const double marginal = totals[k] + double(shift[k]) * kLn2 + log_most, z = double(posteriors.z.at(d, i)[k]);
          statistics[d * rows + i + k] = T(marginal);
          log_prod[k] += marginal;
          log_pz[k] -= 0.5 * (z * z + kLog2Pi);
        }
      }

      double top[kPairRows], total[kPairRows] = {}, own[kPairRows] = {};
      std::fill(top, top + kPairRows, -HUGE_VAL);
      for (int64_t j = 0; j < posteriors.padded; j += kStretch) {
        const int n = int(smaller(kStretch, posteriors.padded - j));
        posteriors.joint(i, j, n, squares);
        for (int k = 0; k < valid; ++k) {
          if (j <= i + k && i + k < j + n) own[k] = squares[k][i + k - j];
          Vec<double> highest(-HUGE_VAL);
          for (int at = 0; at < n; at += Vec<double>::size) highest = max(load(squares[k] + at), highest);
          const double before = top[k];
          top[k] = std::fmax(before, lane_max(highest));
          const double shift = std::isfinite(top[k]) ? top[k] : 0;
          V sum(T(0));
          for (int at = 0; at < n; at += V::size) {
            alignas(kVectorBytes) double x[V::size];
            for (int lane = 0; lane < V::size; lane += Vec<double>::size)
              store(x + lane, load(squares[k] + at + lane) - Vec<double>(shift));
            V e = exp2_bounded(narrowed(x, T()));
            if (posteriors.weighted(i, j + at)) e = e * posteriors.weight(i + k, j + at);
            sum = sum + e;
          }
          if (total[k] != 0) total[k] *= std::exp2(before - shift);
          total[k] += lane_sum(sum);
        }
      }
      for (int k = 0; k < valid; ++k) {
        const double shift = std::isfinite(top[k]) ? top[k] : 0;
        keep_shift(shift, statistics + cols * rows + i + k, rows);
        statistics[(cols + kShiftRows) * rows + i + k] = T(total[k]);
        const double log_qz = shift * kLn2 + std::log(total[k]) + log_most, log_qzx = own[k] * kLn2;
        const double values[kTotalCorrelationRows] = {log_qz,           log_prod[k],          log_qzx, log_qzx - log_qz,
                                                      log_qz - log_prod[k], log_prod[k] - log_pz[k]};
        for (int v = 0; v < kTotalCorrelationRows; ++v) static_cast<T*>(a.values[v])[i + k] = T(values[v]);
      }
    }
  });
}

template <class T>
void total_correlation_backward_in(const TotalCorrelationBackward& a, const Parallel& parallel) {
  using V = Vec<T>;
  const int64_t rows = a.rows, cols = a.cols;
  if (rows == 0) return;
  const Posteriors<T> posteriors(a, parallel);
  std::vector<RowSlopes> slopes_of;
  for (int64_t row = 0; row < rows; ++row) {
    double grads[kTotalCorrelationRows];
    for (int v = 0; v < kTotalCorrelationRows; ++v)
      grads[v] = double(static_cast<const T*>(a.grads[v])[row * a.grad_stride[v]]);
    slopes_of.emplace_back(grads);
    for (int64_t d = 0; slopes_of[row].none() && d < cols; ++d) *posteriors.z.at(d, row) = 0;  // whatever it is
  }
  posteriors.z.pad_with_last();
  const T* const statistics = static_cast<const T*>(a.statistics);
  const double log2_most = std::log2(a.weights.most);
  const int64_t blocks = ceil_div(rows, kPairRows);

  const Staged<T> grad_z(rows, cols);
  const int64_t units = pair_units<T>(blocks, 2 * grad_z.stride * cols);
  std::vector<Staged<T>> first(units), second(units);  // of each unit: sums over i of G t, and of G t² - G kPeakShare
  in_parallel(parallel, units, grain_of(ceil_div(blocks, units) * rows * cols), [&](int64_t begin, int64_t end) {
    alignas(kVectorBytes) double squares[kPairRows][kStretch];
    alignas(kVectorBytes) T joint[kPairRows][kStretch];
    // of each column and row: what the densities are divided by (a power of 2), and what the quotient counts
    const Numbers<T> marginals = numbers<T>(cols * kPairRows), of_marginals = numbers<T>(cols * kPairRows);
    for (int64_t unit = begin; unit < end; ++unit) {
      first[unit] = Staged<T>(rows, cols);
      second[unit] = Staged<T>(rows, cols);
      first[unit].zero();
      second[unit].zero();
      for (int64_t block = unit * blocks / units; block < (unit + 1) * blocks / units; ++block) {
        const int64_t i = block * kPairRows;
        const int valid = int(smaller(kPairRows, rows - i));
        double of_joint[kPairRows], of_own[kPairRows], of_prior[kPairRows], shift[kPairRows];
        for (int k = 0; k < kPairRows; ++k) {
          const int64_t row = i + smaller(k, valid - 1);  // rows beyond the last are its copies, without gradient
          const RowSlopes& slopes = slopes_of[row];
          const bool none = slopes.none();
          const double counts = k < valid ? 1 : 0, total = double(statistics[(cols + kShiftRows) * rows + row]);
          of_joint[k] = none || total == 0 ? 0 : counts * slopes.joint / total;
          of_own[k] = counts * slopes.own;
          of_prior[k] = counts * slopes.prior;
          shift[k] = none ? HUGE_VAL : kept_shift(statistics + cols * rows + row, rows);
          for (int64_t d = 0; d < cols; ++d) {
            const T marginal = statistics[d * rows + row];
            // no density at all: no weight, and no gradient
            marginals[d * kPairRows + k] =
                none || marginal == T(-HUGE_VAL) ? T(HUGE_VAL) : T(double(marginal) / kLn2 - log2_most);
            of_marginals[d * kPairRows + k] = T(counts * slopes.marginals);
          }
        }
        for (int64_t d = 0; d < cols; ++d) posteriors.renew(d, i, marginals.get() + d * kPairRows, of_marginals.get() + d * kPairRows);
        for (int64_t d = 0; d < cols; ++d)
          for (int k = 0; k < valid; ++k) grad_z.at(d, i)[k] = T(-of_prior[k]) * posteriors.z.at(d, i)[k];

        for (int64_t j = 0; j < posteriors.padded; j += kStretch) {
          const int n = int(smaller(kStretch, posteriors.padded - j));
          posteriors.joint(i, j, n, squares);
          for (int k = 0; k < kPairRows; ++k) {
            for (int at = 0; at < n; at += V::size) {
              alignas(kVectorBytes) double x[V::size];
              for (int lane = 0; lane < V::size; lane += Vec<double>::size)
                store(x + lane, load(squares[k] + at + lane) - Vec<double>(shift[k]));
              V e = exp2_bounded(narrowed(x, T())) * V(T(of_joint[k]));
              if (posteriors.weighted(i, j + at)) e = e * posteriors.weight(i + k, j + at);
              store(joint[k] + at, e);
            }
            if (j <= i + k && i + k < j + n) joint[k][i + k - j] += T(of_own[k]);
          }
          for (int64_t d = 0; d < cols; ++d) {
            const T *points = posteriors.z.at(d, i), *lse = marginals.get() + d * kPairRows;
            const T* of_marginal = of_marginals.get() + d * kPairRows;
            const T *m = posteriors.mean.at(d, j), *r = posteriors.rate.at(d, j), *p = posteriors.peak.at(d, j);
            T *sum_t = first[unit].at(d, j), *sum_t2 = second[unit].at(d, j);
            V of_z[kPairRows];
            for (int k = 0; k < kPairRows; ++k) of_z[k] = V(T(0));
            for (int at = 0; at < n; at += V::size) {
              const V center = load(m + at), scale = load(r + at), top = load(p + at);
              V one = load(sum_t + at), two = load(sum_t2 + at);
              const bool weighted = posteriors.weighted(i, j + at);
              for (int k = 0; k < kPairRows; ++k) {
                const V t = (V(points[k]) - center) * scale;
                V e = exp2_bounded(top - t * t - V(lse[k]));
                if (__builtin_expect(weighted, false)) e = e * posteriors.weight(i + k, j + at);
                const V g = load(joint[k] + at) + e * V(of_marginal[k]);
                const V u = g * t;
                of_z[k] = of_z[k] + u * scale;
                one = one + u;
                two = two + u * t - g * constant<V>(kPeakShare);
              }
              store(sum_t + at, one);
              store(sum_t2 + at, two);
            }
            for (int k = 0; k < valid; ++k) grad_z.at(d, i)[k] -= T(kMeanSlope * lane_sum(of_z[k]));
          }
        }
      }
    }
  });
  unstage_points(grad_z, a.grad_z, a.dtype, parallel);
  sum_units(first, parallel);
  sum_units(second, parallel);
  in_parallel(parallel, cols, grain_of(rows / 4), [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      for (int64_t j = 0; j < posteriors.padded; j += V::size) {
        store(first[0].at(d, j), load(first[0].at(d, j)) * load(posteriors.rate.at(d, j)) * constant<V>(kMeanSlope));
        store(second[0].at(d, j), load(second[0].at(d, j)) * constant<V>(kLn2));
      }
    }
  });
  unstage_points(first[0], a.grad_mean, a.dtype, parallel);
  unstage_points(second[0], a.grad_logvar, a.dtype, parallel);
}

// ---- maximum mean discrepancy ----------------------------------------------------------------------------------------

// lanes of point j … that make a pair with row i: i < j < points within one set, j < points between two
template <class T>
UNIGEN_INLINE Vec<T> counted(Vec<T> x, int64_t i, int64_t j, bool within, int64_t points) {
  if (within && j <= i) x = select(lanes_from<T>(i + 1, j), x, constant<Vec<T>>(0));
  if (j + Vec<T>::size > points) x = select(lanes_from<T>(points, j), constant<Vec<T>>(0), x);
  return x;
}

constexpr int kSlopes = 4 * kStretch;  // points j whose slopes are kept at a time
constexpr int64_t kMmdUnits = 8;       // each with gradients of its own

// The sums over pairs of two sets, or within one, and the gradients of those points that `of_*` has room for.
template <class T, class Kernel>
class PairSums {
  using V = Vec<T>;

 public:
  PairSums(const Mmd& a, const Staged<T>& x, const Staged<T>& y)
      : factor(&x == &y ? a.within(x.points) : a.across()), x_(x), y_(y), within_(&x == &y), scales_(a.scales),
        slope_factor_(T(2 * factor)) {
    for (int s = 0; s < scales_; ++s) parameters_[s] = V(T(a.parameters[s]));
  }

  // over the pairs of kPairRows points x from `i` on
  double of_block(int64_t i, const Staged<T>* of_x, const Staged<T>* of_y) const {
    alignas(kVectorBytes) T squares[kPairRows][kStretch], slopes[kPairRows][kSlopes];
    const int64_t end = round_up(y_.points, V::size);
    double total = 0;
    for (int64_t first = within_ ? i / V::size * V::size : 0; first < end; first += kSlopes) {
      const int n = int(smaller(kSlopes, end - first));
      for (int piece = 0; piece < n; piece += kStretch) {
        const int size = int(smaller(kStretch, n - piece));
        square_distances<T, false>(x_, i, y_, nullptr, first + piece, size, squares);
        for (int k = 0; k < kPairRows; ++k) {
          const bool with_slopes = of_x || of_y;
          total += with_slopes ? kernel_of<true>(squares[k], i + k, first + piece, size, slopes[k] + piece)
                               : kernel_of<false>(squares[k], i + k, first + piece, size, nullptr);
        }
      }
      if (of_x && of_y) add_slopes<true, true>(i, first, n, slopes, of_x, of_y);
      else if (of_x) add_slopes<true, false>(i, first, n, slopes, of_x, of_y);
      else if (of_y) add_slopes<false, true>(i, first, n, slopes, of_x, of_y);
    }
    return total;
  }

  const double factor;  // what a pair counts

 private:
  // the sum over a stretch of points j of pairs with row i, and the slopes
  template <bool with_slopes>
  UNIGEN_INLINE double kernel_of(const T* squares, int64_t i, int64_t j, int n, T* slopes) const {
    V sum(T(0));
    const bool present = i < x_.points;  // a row beyond the last has no pairs
    for (int at = 0; at < n; at += V::size) {
      const V square = load(squares + at);
      V value(T(0)), slope(T(0));
      for (int s = 0; s < scales_; ++s) {
        const KernelTerm<V> term(square, Kernel::value, parameters_[s]);
        value = value + term.value;
        if constexpr (with_slopes) slope = slope + term.slope;
      }
      if (present) sum = sum + counted(value, i, j + at, within_, y_.points);
      if constexpr (with_slopes)
        store(slopes + at, present ? counted(slope * slope_factor_, i, j + at, within_, y_.points) : V(T(0)));
    }
    return lane_sum(sum);
  }

  template <bool with_x, bool with_y>
  UNIGEN_NOINLINE void add_slopes(int64_t i, int64_t j, int n, const T (*slopes)[kSlopes], const Staged<T>* of_x,
                                  const Staged<T>* of_y) const {
    const int valid = int(smaller(kPairRows, x_.points - i));
    for (int64_t d = 0; d < x_.cols; ++d) {
      const T *points = x_.at(d, i), *others = y_.at(d, j);
      T* const of_others = with_y ? of_y->at(d, j) : nullptr;
      V of_points[kPairRows];
      for (int k = 0; k < kPairRows; ++k) of_points[k] = V(T(0));
      for (int at = 0; at < n; at += V::size) {
        const V other = load(others + at);
        V sum(T(0));
        for (int k = 0; k < kPairRows; ++k) {
          const V slope = load(slopes[k] + at), difference = V(points[k]) - other;
          if constexpr (with_x) of_points[k] = of_points[k] + slope * difference;
          if constexpr (with_y) sum = sum + slope * difference;
        }
        if constexpr (with_y) store(of_others + at, load(of_others + at) - sum);
      }
      if constexpr (with_x)
        for (int k = 0; k < valid; ++k) of_x->at(d, i)[k] += T(lane_sum(of_points[k]));
    }
  }

  const Staged<T>&x_, &y_;
  bool within_;
  int scales_;
  V slope_factor_, parameters_[kMaxScales];
};

template <class Body>
UNIGEN_INLINE void with_pair_kernel(PairKernel kernel, const Body& body) {
  if (kernel == PairKernel::rbf) body(std::integral_constant<PairKernel, PairKernel::rbf>{});
  else body(std::integral_constant<PairKernel, PairKernel::imq>{});
}

template <class T, class Kernel>
void mmd_in(const Mmd& a, const Parallel& parallel, Kernel) {
  const Staged<T> x(a.x_rows, a.cols), y(a.y_rows, a.cols);
  stage_points(x, a.x, a.dtype, parallel);
  stage_points(y, a.y, a.dtype, parallel);
  x.pad_with_last();
  y.pad_with_last();
  const PairSums<T, Kernel> sums[3] = {{a, x, x}, {a, y, y}, {a, x, y}};
  const bool with_x = a.grad_x.data, with_y = a.grad_y.data;
  const int64_t x_blocks = ceil_div(a.x_rows, kPairRows), y_blocks = ceil_div(a.y_rows, kPairRows);
  const int64_t accumulated = (x.stride + y.stride) * a.cols;
  const int64_t units = smaller(pair_units<T>(larger(x_blocks, y_blocks), accumulated), kMmdUnits);
  const int64_t points = a.x_rows + a.y_rows, steps = points * points / units * larger(1, a.cols) / 4;

  double partial[kMmdUnits][3] = {};
  std::vector<Staged<T>> of_x(units), of_y(units);
  in_parallel(parallel, units, grain_of(steps), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto room = [](bool wanted, const Staged<T>& points, Staged<T>& gradients) {
        if (!wanted) return static_cast<Staged<T>*>(nullptr);
        gradients = Staged<T>(points.points, points.cols);
        gradients.zero();
        return &gradients;
      };
      const Staged<T>*to_x = room(with_x, x, of_x[unit]), *to_y = room(with_y, y, of_y[unit]);
      // every so manyth block, as those of a triangle differ in size
      for (int64_t b = unit; b < x_blocks; b += units) partial[unit][0] += sums[0].of_block(b * kPairRows, to_x, to_x);
      for (int64_t b = unit; b < y_blocks; b += units) partial[unit][1] += sums[1].of_block(b * kPairRows, to_y, to_y);
      for (int64_t b = unit; b < x_blocks; b += units) partial[unit][2] += sums[2].of_block(b * kPairRows, to_x, to_y);
    }
  });
  double value = a.diagonal(a.x_rows) + a.diagonal(a.y_rows);
  for (int which = 0; which < 3; ++which) {
    double sum = 0;
    for (int64_t unit = 0; unit < units; ++unit) sum += partial[unit][which];
    value += sum * sums[which].factor;
  }
  *static_cast<T*>(a.value) = T(value);
  constexpr DType dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const auto finish = [&](bool wanted, const std::vector<Staged<T>>& gradients, const Matrix& target) {
    if (!wanted) return;
    sum_units(gradients, parallel);
    unstage_points(gradients[0], target, dtype, parallel);
  };
  finish(with_x, of_x, a.grad_x);
  finish(with_y, of_y, a.grad_y);
}

// the gradients times that of the loss
template <class T>
void mmd_backward_in(const MmdBackward& a, const Parallel& parallel) {
  const T grad = *static_cast<const T*>(a.grad);
  for (int side = 0; side < 2; ++side) {
    const T* const gradients = static_cast<const T*>(a.gradients[side]);
    const Matrix& target = a.targets[side];
    if (!target.data) continue;
    in_parallel(parallel, a.rows[side], grain_of(a.cols / 4), [&](int64_t begin, int64_t end) {
      const Numbers<T> scaled = numbers<T>(a.cols);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t d = 0; d < a.cols; ++d) scaled[d] = grad * gradients[row * a.cols + d];
        with_storage<T>(a.dtype, target.data,
                        [&](auto* to) { scatter(scaled.get(), to + row * target.row, target.col, a.cols); });
      }
    });
  }
}

}  // namespace

void total_correlation(const TotalCorrelation& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { total_correlation_in<decltype(t)>(a, parallel); });
}
void total_correlation_backward(const TotalCorrelationBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { total_correlation_backward_in<decltype(t)>(a, parallel); });
}
void mmd(const Mmd& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) {
    with_pair_kernel(a.kernel, [&](auto kernel) { mmd_in<decltype(t)>(a, parallel, kernel); });
  });
}
void mmd_backward(const MmdBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { mmd_backward_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
