// Kernels over all pairs of a minibatch. A block takes tiles of kTile points i × kTile points j; nothing is kept for a pair
// beyond its tile. Whoever owns a point adds up its gradient, tile after tile: no atomics, the same sums in every run.
#include "../formulas/pairwise.h"

#include <type_traits>

#include "rows.cuh"

namespace unigen::cuda {
namespace {

constexpr int kTile = 32;                        // points, and columns staged at a time
constexpr int kPerThread = kTile * kTile / kThreads;  // pairs of a tile, or columns of a point
constexpr int kWarps = kThreads / kWarp;
static_assert(kTile == kWarp, "a lane is a point");

// one column more than needed: neighbouring points lie in different banks
template <class T>
using Tile = T[kTile][kTile + 1];

template <class E>
UNIGEN_DEVICE Arithmetic<E> element(const Matrix& matrix, int64_t row, int64_t col) {
  return Arithmetic<E>(static_cast<const E*>(matrix.data)[row * matrix.row + col * matrix.col]);
}
template <class E>
UNIGEN_DEVICE void put(const Matrix& matrix, int64_t row, int64_t col, Arithmetic<E> x) {
  static_cast<E*>(matrix.data)[row * matrix.row + col * matrix.col] = E(x);
}

// body(point, column) of a tile for each of the thread's places
template <class Body>
UNIGEN_DEVICE void for_tile(const Body& body) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) body(int(threadIdx.x) / kTile + k * kWarps, int(threadIdx.x) % kTile);
}

// ---- total correlation -----------------------------------------------------------------------------------------------

template <class T>
struct PosteriorTile {
  Tile<T> z, mean, rate, peak;
};

// What lies beyond the matrices: z 0, and posteriors with no density at all.
template <class E, class T>
UNIGEN_DEVICE void stage_z(const Matrix& z, int64_t rows, int64_t cols, int64_t i, int64_t d, Tile<T>& to) {
  for_tile([&](int point, int col) {
    to[point][col] = i + point < rows && d + col < cols ? element<E>(z, i + point, d + col) : T(0);
  });
}
template <class E, class T>
UNIGEN_DEVICE void stage_posterior(const Matrix& mean, const Matrix& logvar, int64_t rows, int64_t cols, int64_t j, int64_t d,
                                   PosteriorTile<T>& to) {
  for_tile([&](int point, int col) {
    const bool inside = j + point < rows && d + col < cols;
    const ScaledGaussian<T> gaussian(inside ? element<E>(logvar, j + point, d + col) : T(0));
    to.mean[point][col] = inside ? element<E>(mean, j + point, d + col) : T(0);
    to.rate[point][col] = inside ? gaussian.rate : T(0);
    to.peak[point][col] = inside ? gaussian.peak : d + col < cols ? T(-HUGE_VAL) : T(0);
  });
}

template <class T>
UNIGEN_DEVICE T pair_weight(const PairWeights& weights, int64_t rows, int64_t i, int64_t j) {
  if (weights.columns) return j == 0 && i + 2 != rows ? T(weights.diagonal) : j < 2 ? T(weights.following) : T(1);
  if (j == i) return T(weights.diagonal);
  return j == (i + 1 < rows ? i + 1 : 0) ? T(weights.following) : T(1);
}

// log2 density of pairs of a tile, summed over the columns: lane `lane` is point i if `own_i`, else j; the other point of
// pair k is warp · kPerThread + k. Between two barriers of its own.
template <bool own_i, class E, class Arguments, class T>
UNIGEN_DEVICE void joint_densities(const Arguments& a, int64_t i, int64_t j, PosteriorTile<T>& tile,
                                   double (&found)[kPerThread]) {
  const int lane = int(threadIdx.x) % kWarp, other = int(threadIdx.x) / kWarp * kPerThread;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) found[k] = 0;
  for (int64_t d = 0; d < a.cols; d += kTile) {
    __syncthreads();
    stage_z<E>(a.z, a.rows, a.cols, i, d, tile.z);
    stage_posterior<E>(a.mean, a.logvar, a.rows, a.cols, j, d, tile);
    __syncthreads();
    T sum[kPerThread] = {};
    const int cols = a.cols - d < kTile ? int(a.cols - d) : kTile;
#pragma unroll(sizeof(T) == 8 ? 1 : 4)
    for (int c = 0; c < cols; ++c) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int row = own_i ? lane : other + k, col = own_i ? other + k : lane;
        const T t = (tile.z[row][c] - tile.mean[col][c]) * tile.rate[col][c];
        sum[k] += tile.peak[col][c] - t * t;
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) found[k] += double(sum[k]);
  }
  __syncthreads();
}

// statistics[d, i] = log sum_j W_ij N(z_id; j), for a tile of rows and one of columns
template <class E>
__global__ void __launch_bounds__(kThreads, kResident) marginals_kernel(const __grid_constant__ TotalCorrelation a) {
  using T = Arithmetic<E>;
  __shared__ PosteriorTile<T> tile;
  const int64_t i = int64_t(blockIdx.x) * kTile + threadIdx.x % kWarp;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  for (int64_t d = int64_t(blockIdx.y) * kTile; d < a.cols; d += int64_t(gridDim.y) * kTile) {
    __syncthreads();
    stage_z<E>(a.z, a.rows, a.cols, int64_t(blockIdx.x) * kTile, d, tile.z);
    T top[kPerThread], total[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      top[k] = T(-HUGE_VAL);
      total[k] = 0;
    }
    for (int64_t j = 0; j < a.rows; j += kTile) {
      __syncthreads();
      stage_posterior<E>(a.mean, a.logvar, a.rows, a.cols, j, d, tile);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int c = warp * kPerThread + k;
        const T z = tile.z[lane][c];
        T highest = top[k];
#pragma unroll 4
        for (int p = 0; p < kTile; ++p) {
          const T t = (z - tile.mean[p][c]) * tile.rate[p][c];
          highest = larger(highest, tile.peak[p][c] - t * t);
        }
        const T shift = highest > T(-HUGE_VAL) && highest < T(HUGE_VAL) ? highest : T(0);
        T sum = 0;
#pragma unroll 4
        for (int p = 0; p < kTile; ++p) {
          const T t = (z - tile.mean[p][c]) * tile.rate[p][c];
          sum += exp2_bounded(tile.peak[p][c] - t * t - shift) * pair_weight<T>(a.weights, a.rows, i, j + p);
        }
        total[k] = (total[k] == 0 ? T(0) : total[k] * exp2_bounded(top[k] - shift)) + sum;
        top[k] = highest;
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t col = d + warp * kPerThread + k;
      if (i >= a.rows || col >= a.cols) continue;
      const double shift = top[k] > T(-HUGE_VAL) && top[k] < T(HUGE_VAL) ? double(top[k]) : 0.0;
      static_cast<T*>(a.statistics)[col * a.rows + i] = T(shift * kLn2 + log(double(total[k])) + log(a.weights.most));
    }
  }
}

// the joint, and the rows' values from it and the marginals
template <class E>
__global__ void __launch_bounds__(kThreads, kResident) joint_kernel(const __grid_constant__ TotalCorrelation a) {
  using T = Arithmetic<E>;
  __shared__ PosteriorTile<T> tile;
  __shared__ double tops[kWarps][kWarp], totals[kWarps][kWarp], own[kWarp];
  const int64_t first = int64_t(blockIdx.x) * kTile, i = first + threadIdx.x % kWarp;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  double top = -HUGE_VAL, total = 0;
  for (int64_t j = 0; j < a.rows; j += kTile) {
    double found[kPerThread];
    joint_densities<true, E>(a, first, j, tile, found);
    const double before = top;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t point = j + warp * kPerThread + k;
      if (point == i) own[lane] = found[k];
      if (point >= a.rows) found[k] = -HUGE_VAL;
      top = larger(top, found[k]);
    }
    const double shift = top > -HUGE_VAL && top < HUGE_VAL ? top : 0.0;
    if (total != 0) total *= double(exp2_bounded(T(before - shift)));
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t point = j + warp * kPerThread + k;
      total += double(exp2_bounded(T(found[k] - shift)) * pair_weight<T>(a.weights, a.rows, i, point));
    }
  }
  tops[warp][lane] = top;
  totals[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || i >= a.rows) return;
  for (int w = 1; w < kWarps; ++w) top = larger(top, tops[w][lane]);
  const double shift = top > -HUGE_VAL && top < HUGE_VAL ? top : 0.0;
  T* const statistics = static_cast<T*>(a.statistics);
  double sum = 0, log_prod = 0, log_pz = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (totals[w][lane] == 0) continue;
    const double highest = tops[w][lane];
    sum += totals[w][lane] * exp2((highest > -HUGE_VAL && highest < HUGE_VAL ? highest : 0.0) - shift);
  }
  for (int64_t d = 0; d < a.cols; ++d) {
    const double z = double(element<E>(a.z, i, d));
    log_prod += double(statistics[d * a.rows + i]);
    log_pz -= 0.5 * (z * z + kLog2Pi);
  }
  keep_shift(shift, statistics + a.cols * a.rows + i, a.rows);
  statistics[(a.cols + kShiftRows) * a.rows + i] = T(sum);
  const double log_qz = shift * kLn2 + log(sum) + log(a.weights.most), log_qzx = own[lane] * kLn2;
  static_cast<T*>(a.values[0])[i] = T(log_qz);
  static_cast<T*>(a.values[1])[i] = T(log_prod);
  static_cast<T*>(a.values[2])[i] = T(log_qzx);
  static_cast<T*>(a.values[3])[i] = T(log_qzx - log_qz);
  static_cast<T*>(a.values[4])[i] = T(log_qz - log_prod);
  static_cast<T*>(a.values[5])[i] = T(log_prod - log_pz);
}

// what a row's gradients are to its pairs
template <class T>
struct RowTerms {
  double shift;  // of the joint, a power of 2
  T joint, marginals, own, prior;
  bool none;  // whether it has no gradient, whatever it is
};

template <class T>
UNIGEN_DEVICE RowTerms<T> row_terms(const TotalCorrelationBackward& a, int64_t i) {
  if (i >= a.rows) return {0, T(0), T(0), T(0), T(0), true};
  double grads[kTotalCorrelationRows];
#pragma unroll
  for (int v = 0; v < kTotalCorrelationRows; ++v) grads[v] = double(static_cast<const T*>(a.grads[v])[i * a.grad_stride[v]]);
  const RowSlopes slopes(grads);
  const T* const statistics = static_cast<const T*>(a.statistics);
  const double total = double(statistics[(a.cols + kShiftRows) * a.rows + i]);
  return {kept_shift(statistics + a.cols * a.rows + i, a.rows), T(total == 0 ? 0.0 : slopes.joint / total), T(slopes.marginals),
          T(slopes.own), T(slopes.prior), slopes.none()};
}

// What the densities of a row and column are divided by: 2^shift · sum.
template <class T>
struct Marginal {
  T shift, inverse;  // 1 / sum
};

template <class E, class T>
UNIGEN_DEVICE Marginal<T> far_marginal_of(const TotalCorrelationBackward& a, int64_t i, int64_t d) {
  const T z = element<E>(a.z, i, d);
  const auto density = [&](int64_t j) {
    const ScaledGaussian<T> gaussian(element<E>(a.logvar, j, d));
    const T t = (z - element<E>(a.mean, j, d)) * gaussian.rate;
    return gaussian.peak - t * t;
  };
  T top = T(-HUGE_VAL), sum = 0;
  for (int64_t j = 0; j < a.rows; ++j) top = larger(top, density(j));
  for (int64_t j = 0; j < a.rows; ++j) sum += exp2_bounded(density(j) - top) * pair_weight<T>(a.weights, a.rows, i, j);
  return {top, T(1) / sum};
}

template <class E, class T>
UNIGEN_DEVICE Marginal<T> marginal_of(const TotalCorrelationBackward& a, int64_t i, int64_t d, bool none, double log2_most) {
  const Marginal<T> nothing{T(HUGE_VAL), T(1)};  // leaves no weight
  if (none || i >= a.rows || d >= a.cols) return nothing;
  const T kept = static_cast<const T*>(a.statistics)[d * a.rows + i];
  if (kept == T(-HUGE_VAL)) return nothing;
  const T shift = T(double(kept) / kLn2 - log2_most);
  // In float64 this kernel has not the registers: some digits are lost, and 1e8 standard deviations away all of them.
  if constexpr (sizeof(T) == 4) {
    if (far_marginal(shift)) return far_marginal_of<E, T>(a, i, d);
  }
  return {shift, T(1)};
}

// A block owns a tile of points and one of columns: rows i, for d / d z, or rows j, for d / d mean and d / d logvar.
template <bool own_i, class E>
__global__ void __launch_bounds__(kThreads, kResident) pair_slopes_kernel(const __grid_constant__ TotalCorrelationBackward a) {
  using T = Arithmetic<E>;
  __shared__ PosteriorTile<T> tile;
  __shared__ Tile<T> slopes;  // [other point][own point]: what each pair's joint density counts
  __shared__ RowTerms<T> terms[kTile];
  __shared__ bool far;  // whether some marginal of the tile has an inverse of its own
  const int64_t first = int64_t(blockIdx.x) * kTile;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t own = first + lane;
  const double log2_most = log2(a.weights.most);
  for (int64_t d = int64_t(blockIdx.y) * kTile; d < a.cols; d += int64_t(gridDim.y) * kTile) {
    double sum_t[kPerThread] = {}, sum_t2[kPerThread] = {};
    for (int64_t from = 0; from < a.rows; from += kTile) {
      const int64_t i = own_i ? first : from, j = own_i ? from : first;
      __syncthreads();
      if (warp == 0) terms[lane] = row_terms<T>(a, i + lane);
      if (threadIdx.x == 0) far = false;
      double found[kPerThread];
      joint_densities<own_i, E>(a, i, j, tile, found);
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int other = warp * kPerThread + k, row = own_i ? lane : other, col = own_i ? other : lane;
        const RowTerms<T>& term = terms[row];
        T slope = 0;
        if (i + row < a.rows && j + col < a.rows && !term.none) {
          slope = exp2_bounded(T(found[k] - term.shift)) * pair_weight<T>(a.weights, a.rows, i + row, j + col) * term.joint;
          if (i + row == j + col) slope += term.own;
        }
        slopes[other][lane] = slope;
      }
      stage_z<E>(a.z, a.rows, a.cols, i, d, tile.z);
      for_tile([&](int point, int c) { tile.z[point][c] = terms[point].none ? T(0) : tile.z[point][c]; });
      stage_posterior<E>(a.mean, a.logvar, a.rows, a.cols, j, d, tile);
      // the posterior of an own point goes to registers; its place serves the marginals of the others: peak their shifts,
      // mean their inverses
      T own_mean[kPerThread], own_rate[kPerThread], own_peak[kPerThread], own_inverse[kPerThread];
      const auto marginal = [&](int row, int c) {
        const Marginal<T> found = marginal_of<E, T>(a, i + row, d + c, terms[row].none, log2_most);
        if (found.inverse != T(1)) far = true;
        return found;
      };
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int c = warp * kPerThread + k;
        if constexpr (own_i) {
          const Marginal<T> found = marginal(lane, c);
          own_peak[k] = found.shift;
          own_inverse[k] = found.inverse;
        } else {
          own_mean[k] = tile.mean[lane][c];
          own_rate[k] = tile.rate[lane][c];
          own_peak[k] = tile.peak[lane][c];
        }
      }
      if constexpr (!own_i) {
        __syncthreads();
        for_tile([&](int c, int point) {
          const Marginal<T> found = marginal(point, c);
          tile.peak[point][c] = found.shift;
          tile.mean[point][c] = found.inverse;
        });
      }
      __syncthreads();
      T part_t[kPerThread] = {}, part_t2[kPerThread] = {};
      const auto add_pairs = [&](auto with_inverse) {
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
        for (int other = 0; other < kTile; ++other) {
          const int row = own_i ? lane : other, col = own_i ? other : lane;
          if (from + other >= a.rows) break;
          const T weight = pair_weight<T>(a.weights, a.rows, i + row, j + col) * terms[row].marginals;
          const T joint = slopes[other][lane];
#pragma unroll
          for (int k = 0; k < kPerThread; ++k) {
            const int c = warp * kPerThread + k;
            const T rate = own_i ? tile.rate[other][c] : own_rate[k];
            const T t = (tile.z[row][c] - (own_i ? tile.mean[other][c] : own_mean[k])) * rate;
            // of the posterior, and of the marginal
            const T peak = own_i ? tile.peak[other][c] : own_peak[k], shift = own_i ? own_peak[k] : tile.peak[other][c];
            T e = exp2_bounded(peak - t * t - shift);
            if constexpr (decltype(with_inverse)::value) e *= own_i ? own_inverse[k] : tile.mean[other][c];
            const T g = joint + e * weight, u = g * t;
            if constexpr (own_i) {
              part_t[k] += u * rate;
            } else {
              part_t[k] += u;
              part_t2[k] += u * t - g * T(kPeakShare);
            }
          }
        }
      };
      if (sizeof(T) == 4 && far) add_pairs(std::true_type{});
      else add_pairs(std::false_type{});
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        sum_t[k] += double(part_t[k]);
        if constexpr (!own_i) sum_t2[k] += double(part_t2[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t col = d + warp * kPerThread + k;
      if (own >= a.rows || col >= a.cols) continue;
      if constexpr (own_i) {
        const T prior = terms[lane].prior;
        put<E>(a.grad_z, own, col, T(-kMeanSlope * sum_t[k]) - weighted(prior, element<E>(a.z, own, col)));
      } else {
        const ScaledGaussian<T> gaussian(element<E>(a.logvar, own, col));
        if (a.grad_mean.data) put<E>(a.grad_mean, own, col, T(kMeanSlope * sum_t[k]) * gaussian.rate);
        if (a.grad_logvar.data) put<E>(a.grad_logvar, own, col, T(kLn2 * sum_t2[k]));
      }
    }
  }
}

// ---- maximum mean discrepancy ----------------------------------------------------------------------------------------

// squared distances of points a0 + lane and b0 + warp · kPerThread + k
template <class E, class T>
UNIGEN_DEVICE void square_distances(const Matrix& a, int64_t a_rows, int64_t a0, const Matrix& b, int64_t b_rows, int64_t b0,
                                    int64_t cols, Tile<T>& a_tile, Tile<T>& b_tile, double (&found)[kPerThread]) {
  const int lane = int(threadIdx.x) % kWarp, other = int(threadIdx.x) / kWarp * kPerThread;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) found[k] = 0;
  for (int64_t d = 0; d < cols; d += kTile) {
    __syncthreads();
    stage_z<E>(a, a_rows, cols, a0, d, a_tile);
    stage_z<E>(b, b_rows, cols, b0, d, b_tile);
    __syncthreads();
    T sum[kPerThread] = {};
#pragma unroll 8
    for (int c = 0; c < kTile; ++c) {
      const T x = a_tile[lane][c];
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const T t = x - b_tile[other + k][c];
        sum[k] += t * t;
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) found[k] += double(sum[k]);
  }
  __syncthreads();
}

constexpr int64_t kValueBlocks = 1024;  // each with a number in the workspace

// A block adds up the kernel over pairs of a tile of points of x, or of y, with all of its own set, each pair twice, and of
// x with y.
template <class E>
__global__ void __launch_bounds__(kThreads, kResident) mmd_kernel(const __grid_constant__ Mmd a, double* partial) {
  using T = Arithmetic<E>;
  __shared__ Tile<T> tile, others;
  __shared__ double sums[kThreads];
  const int64_t x_blocks = (a.x_rows + kTile - 1) / kTile, y_blocks = (a.y_rows + kTile - 1) / kTile;
  const int lane = int(threadIdx.x) % kWarp, other = int(threadIdx.x) / kWarp * kPerThread;
  double total = 0;
  for (int64_t block = blockIdx.x; block < x_blocks + y_blocks; block += gridDim.x) {
    const bool of_x = block < x_blocks;
    const Matrix& own = of_x ? a.x : a.y;
    const int64_t own_rows = of_x ? a.x_rows : a.y_rows, first = (of_x ? block : block - x_blocks) * kTile;
    for (int across = 0; across <= (of_x ? 1 : 0); ++across) {
      const Matrix& set = across ? a.y : own;
      const int64_t rows = across ? a.y_rows : own_rows;
      const double factor = across ? a.across() : a.within(own_rows) / 2;
      for (int64_t from = 0; from < rows; from += kTile) {
        double found[kPerThread];
        square_distances<E>(own, own_rows, first, set, rows, from, a.cols, tile, others, found);
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) {
          const int64_t i = first + lane, j = from + other + k;
          if (i >= own_rows || j >= rows || (!across && i == j)) continue;
          T value = 0;
          for (int s = 0; s < a.scales; ++s) value += KernelTerm<T>(T(found[k]), a.kernel, T(a.parameters[s])).value;
          total += factor * double(value);
        }
      }
    }
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int t = 0; t < kThreads; ++t) sum += sums[t];
  partial[blockIdx.x] = sum;
}

template <class E>
__global__ void __launch_bounds__(kThreads, kResident) mmd_total_kernel(const __grid_constant__ Mmd a, const double* partial, int count) {
  if (threadIdx.x != 0) return;
  double sum = a.diagonal(a.x_rows) + a.diagonal(a.y_rows);
  for (int i = 0; i < count; ++i) sum += partial[i];
  // no points, no mean
  *static_cast<Arithmetic<E>*>(a.value) = Arithmetic<E>(a.x_rows == 0 || a.y_rows == 0 ? double(NAN) : sum);
}

// A block owns a tile of points, of x or of y, and one of columns.
template <class E>
__global__ void __launch_bounds__(kThreads, kResident) mmd_slopes_kernel(const __grid_constant__ Mmd a) {
  using T = Arithmetic<E>;
  __shared__ Tile<T> tile, others, slopes;  // slopes: [other point][own point]
  const int64_t x_blocks = (a.x_rows + kTile - 1) / kTile, block = blockIdx.x;
  const bool of_x = block < x_blocks;
  const Matrix &own = of_x ? a.x : a.y, &grad_own = of_x ? a.grad_x : a.grad_y;
  const int64_t own_rows = of_x ? a.x_rows : a.y_rows, first = (of_x ? block : block - x_blocks) * kTile;
  if (!grad_own.data) return;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  for (int64_t d = int64_t(blockIdx.y) * kTile; d < a.cols; d += int64_t(gridDim.y) * kTile) {
    double sum[kPerThread] = {};
    for (int across = 0; across < 2; ++across) {
      const Matrix& set = (across != 0) == of_x ? a.y : a.x;
      const int64_t rows = (across != 0) == of_x ? a.y_rows : a.x_rows;
      const T factor = T(2 * (across ? a.across() : a.within(own_rows)));
      for (int64_t from = 0; from < rows; from += kTile) {
        double found[kPerThread];
        square_distances<E>(own, own_rows, first, set, rows, from, a.cols, tile, others, found);
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) {
          const int other = warp * kPerThread + k;
          T slope = 0;
          if (first + lane < own_rows && from + other < rows && (across || first + lane != from + other)) {
            for (int s = 0; s < a.scales; ++s) slope += KernelTerm<T>(T(found[k]), a.kernel, T(a.parameters[s])).slope;
          }
          slopes[other][lane] = slope * factor;
        }
        stage_z<E>(own, own_rows, a.cols, first, d, tile);
        stage_z<E>(set, rows, a.cols, from, d, others);
        __syncthreads();
        T part[kPerThread] = {};
#pragma unroll 4
        for (int other = 0; other < kTile; ++other) {
          const T slope = slopes[other][lane];
#pragma unroll
          for (int k = 0; k < kPerThread; ++k) {
            const int c = warp * kPerThread + k;
            part[k] += slope * (tile[lane][c] - others[other][c]);
          }
        }
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) sum[k] += double(part[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t col = d + warp * kPerThread + k;
      if (first + lane < own_rows && col < a.cols) put<T>(grad_own, first + lane, col, T(sum[k]));
    }
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads, kResident) mmd_scale_kernel(const __grid_constant__ MmdBackward a) {
  using T = Arithmetic<E>;
  const T grad = *static_cast<const T*>(a.grad);
  for (int side = 0; side < 2; ++side) {
    if (!a.targets[side].data) continue;
    const T* const gradients = static_cast<const T*>(a.gradients[side]);
    const int64_t size = a.rows[side] * a.cols, step = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step)
      put<E>(a.targets[side], i / a.cols, i % a.cols, grad * gradients[i]);
  }
}

int64_t column_tiles(int64_t cols) { return clamp(divide_up(cols, kTile), 1, 65535); }

}  // namespace

const char* total_correlation(const TotalCorrelation& a, const Launch& launch) {
  if (a.rows == 0) return nullptr;
  return dispatch(a.dtype, [&](auto e) {
    using E = decltype(e);
    const int64_t blocks = divide_up(a.rows, kTile);
    const char* error = start(marginals_kernel<E>, blocks, column_tiles(a.cols), launch, a);
    return error ? error : start(joint_kernel<E>, blocks, 1, launch, a);
  });
}

const char* total_correlation_backward(const TotalCorrelationBackward& a, const Launch& launch) {
  if (a.rows == 0 || a.cols == 0) return nullptr;
  return dispatch(a.dtype, [&](auto e) -> const char* {
    using E = decltype(e);
    const int64_t blocks = divide_up(a.rows, kTile), tiles = column_tiles(a.cols);
    const char* error = a.grad_z.data ? start(pair_slopes_kernel<true, E>, blocks, tiles, launch, a) : nullptr;
    if (error || !(a.grad_mean.data || a.grad_logvar.data)) return error;
    return start(pair_slopes_kernel<false, E>, blocks, tiles, launch, a);
  });
}

const char* mmd(const Mmd& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) -> const char* {
    using E = decltype(e);
    double* partial = static_cast<double*>(launch.workspace);
    const int64_t tiles = divide_up(a.x_rows, kTile) + divide_up(a.y_rows, kTile), blocks = clamp(tiles, 1, kValueBlocks);
    const char* error = start(mmd_kernel<E>, blocks, 1, launch, a, partial);
    if (!error) error = start(mmd_total_kernel<E>, 1, 1, launch, a, partial, int(blocks));
    if (error || !(a.grad_x.data || a.grad_y.data) || tiles == 0 || a.cols == 0) return error;
    return start(mmd_slopes_kernel<E>, tiles, column_tiles(a.cols), launch, a);
  });
}

const char* mmd_backward(const MmdBackward& a, const Launch& launch) {
  const int64_t size = (a.rows[0] > a.rows[1] ? a.rows[0] : a.rows[1]) * a.cols;
  if (size == 0) return nullptr;
  return dispatch(a.dtype, [&](auto e) {
    return start(mmd_scale_kernel<decltype(e)>, clamp(divide_up(size, kThreads), 1, 65535), 1, launch, a);
  });
}

}  // namespace unigen::cuda
