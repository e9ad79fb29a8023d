// The driver of kernels over pairs: a block of kPairRows points i against a stretch of points j, which the lanes run along.
// Coordinates are staged once, transposed to [coordinate, point]. Nothing is kept for a pair but in a stretch's buffer.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

constexpr int kPairRows = 8;
constexpr int kStretch = 256;               // points j at a time
constexpr int64_t kMaxPairUnits = 32;       // each with accumulators of its own
constexpr int64_t kPairScratch = 16 << 20;  // bytes of them altogether, but for four units

constexpr int64_t kLine = 64;  // bytes

struct Free {
  void operator()(void* data) const { std::free(data); }
};

// n uninitialised numbers, aligned to a line of the cache
template <class T>
using Numbers = std::unique_ptr<T[], Free>;
template <class T>
Numbers<T> numbers(int64_t n) {
  void* data = std::aligned_alloc(size_t(kLine), size_t(round_up(larger(1, n * int64_t(sizeof(T))), kLine)));
  if (!data) throw std::bad_alloc();
  return Numbers<T>(static_cast<T*>(data));
}

// [coordinate, point], with room for whole vectors. An odd number of lines from one coordinate to the next: a power of two
// would put all of a point's coordinates in one set of the cache.
template <class T>
struct Staged {
  int64_t points = 0, cols = 0, stride = 0;
  Numbers<T> data;

  Staged() = default;
  Staged(int64_t points, int64_t cols)
      : points(points), cols(cols), stride((ceil_div(points * int64_t(sizeof(T)), kLine) | 1) * kLine / int64_t(sizeof(T))),
        data(numbers<T>(cols * stride)) {}

  UNIGEN_INLINE T* at(int64_t col, int64_t point = 0) const { return data.get() + col * stride + point; }

  // what lies behind the last point
  void pad(T fill) const {
    for (int64_t d = 0; d < cols; ++d) std::fill(at(d, points), at(d, stride), fill);
  }
  void pad_with_last() const {
    for (int64_t d = 0; d < cols; ++d) std::fill(at(d, points), at(d, stride), points ? *at(d, points - 1) : T(0));
  }

  void zero() const { std::fill(data.get(), data.get() + cols * stride, T(0)); }
};

constexpr int64_t kTransposed = 64;  // points transposed at a time: their rows stay in the cache

template <class T>
void stage_points(const Staged<T>& staged, const Matrix& matrix, DType dtype, const Parallel& parallel) {
  in_parallel(parallel, ceil_div(staged.points, kTransposed), grain_of(kTransposed * staged.cols),
              [&](int64_t begin, int64_t end) {
                with_storage<T>(dtype, matrix.data, [&](const auto* source) {
                  for (int64_t first = begin * kTransposed; first < end * kTransposed; first += kTransposed) {
                    const int64_t n = smaller(kTransposed, staged.points - first);
                    for (int64_t d = 0; d < staged.cols; ++d)
                      gather(source + first * matrix.row + d * matrix.col, matrix.row, n, staged.at(d, first));
                  }
                });
              });
}

template <class T>
void unstage_points(const Staged<T>& staged, const Matrix& matrix, DType dtype, const Parallel& parallel) {
  if (!matrix.data) return;
  in_parallel(parallel, ceil_div(staged.points, kTransposed), grain_of(kTransposed * staged.cols),
              [&](int64_t begin, int64_t end) {
                with_storage<T>(dtype, matrix.data, [&](auto* target) {
                  for (int64_t first = begin * kTransposed; first < end * kTransposed; first += kTransposed) {
                    const int64_t n = smaller(kTransposed, staged.points - first);
                    for (int64_t d = 0; d < staged.cols; ++d)
                      scatter(staged.at(d, first), target + first * matrix.row + d * matrix.col, matrix.row, n);
                  }
                });
              });
}

// The units of a sum over all i that has a place for each j: so many by shape alone, whose sums are taken in order.
template <class T>
int64_t pair_units(int64_t blocks, int64_t accumulated) {
  const int64_t fit = larger(4, kPairScratch / larger(1, accumulated * int64_t(sizeof(T))));
  return larger(1, smaller(smaller(fit, kMaxPairUnits), ceil_div(blocks, 2)));
}

// first += the others, each of `size` numbers
template <class T>
void sum_units(const std::vector<Staged<T>>& units, const Parallel& parallel) {
  const int64_t size = units[0].cols * units[0].stride, piece = 4096;
  in_parallel(parallel, ceil_div(size, piece), 8, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * piece; first < smaller(size, end * piece); first += piece) {
      const int n = int(smaller(piece, size - first));
      for (size_t u = 1; u < units.size(); ++u) {
        T* sum = units[0].data.get() + first;
        const T* more = units[u].data.get() + first;
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED { store(sum + i, load(sum + i, l) + load(more + i, l), l); });
      }
    }
  });
}

UNIGEN_INLINE void add_to(float* target, Vec<float> x) { store(target, load(target) + x); }
UNIGEN_INLINE void add_to(double* target, Vec<double> x) { store(target, load(target) + x); }
UNIGEN_INLINE void add_to(double* target, Vec<float> x) { add_lanes(target, x); }

// squares[k][·] = sum over the coordinates of ((x_k - y_j) rate_j)², k < kPairRows, j of a stretch of n (whole vectors).
// x: points from `i` on, y: from `j` on; `rates` null: all 1. Every so many coordinates are added up by themselves.
template <class T, bool rated, class Sum>
UNIGEN_INLINE void square_distances(const Staged<T>& x, int64_t i, const Staged<T>& y, const Staged<T>* rates, int64_t j,
                                    int n, Sum (*squares)[kStretch]) {
  using V = Vec<T>;
  constexpr int64_t kFlushed = 32;
  for (int k = 0; k < kPairRows; ++k) std::fill(squares[k], squares[k] + n, Sum(0));
  for (int64_t first = 0; first < x.cols; first += kFlushed) {
    const int64_t last = smaller(x.cols, first + kFlushed);
    for (int at = 0; at < n; at += V::size) {
      V sum[kPairRows];
      for (int k = 0; k < kPairRows; ++k) sum[k] = V(T(0));
      const T *a = x.at(first, i), *b = y.at(first, j + at), *rate = rated ? rates->at(first, j + at) : nullptr;
      for (int64_t d = first; d < last; ++d) {
        const V center = load(b);
        for (int k = 0; k < kPairRows; ++k) {
          V t = V(a[k]) - center;
          if constexpr (rated) t = t * load(rate);
          sum[k] = sum[k] + t * t;
        }
        a += x.stride;
        b += y.stride;
        if constexpr (rated) rate += rates->stride;
      }
      for (int k = 0; k < kPairRows; ++k) add_to(squares[k] + at, sum[k]);
    }
  }
}

UNIGEN_INLINE Vec<double> narrowed(const double* x, double) { return load(x); }
UNIGEN_INLINE Vec<float> narrowed(const double* x, float) {
  Vec<float> y;
  for (int i = 0; i < Vec<float>::size; ++i) y.v[i] = float(x[i]);
  return y;
}

// lanes of the points j … that are point i
template <class T>
UNIGEN_INLINE Mask<T> lanes_at(int64_t i, int64_t j) {
  typename RawVec<T>::bits index;
  for (int lane = 0; lane < Vec<T>::size; ++lane) index[lane] = lane;
  return {index == (i < j || i - j >= Vec<T>::size ? -1 : int(i - j))};
}

// lanes of the points j … from point `first` on
template <class T>
UNIGEN_INLINE Mask<T> lanes_from(int64_t first, int64_t j) {
  typename RawVec<T>::bits index;
  for (int lane = 0; lane < Vec<T>::size; ++lane) index[lane] = lane;
  return {index >= int(larger(0, smaller(Vec<T>::size, first - j)))};
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
