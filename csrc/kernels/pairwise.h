// What the kernels of pairwise are given: matrices, of which each row is a point.
#pragma once

#include "problem.h"

namespace unigen {

// strides in elements
struct Matrix {
  void* data = nullptr;
  int64_t row = 0, col = 0;
};

// weights of pairs (i, j): `most` for nearly all; relative to it, that of (i, i) and of (i, (i + 1) mod rows). With `columns`
// (i, 0) stands for (i, i), save for the last row but one, and (i, 1), and there (i, 0), for the other.
struct PairWeights {
  double most = 1, diagonal = 1, following = 1;
  bool columns = false;

  bool uniform() const { return diagonal == 1 && following == 1; }
};

constexpr int kTotalCorrelationRows = 6;

// The shift of the joint densities (a power of 2) between forward and backward. It is kept to its last bit, in three rows
// of the arithmetic type: 10^8 standard deviations away the last bit of a float64 is more than an exponential can hold.
constexpr int kShiftRows = 3;

// values [rows] each; statistics [cols + kShiftRows + 1, rows]: logarithms of the marginals, shift and sum of the joint.
// Contiguous, of the arithmetic type.
struct TotalCorrelation {
  DType dtype = DType::float32;
  int64_t rows = 0, cols = 0;
  Matrix z, mean, logvar;  // dtype
  PairWeights weights;
  void* values[kTotalCorrelationRows] = {};
  void* statistics = nullptr;
};

struct TotalCorrelationBackward {
  DType dtype = DType::float32;
  int64_t rows = 0, cols = 0;
  Matrix z, mean, logvar;
  PairWeights weights;
  const void* grads[kTotalCorrelationRows] = {};
  int64_t grad_stride[kTotalCorrelationRows] = {};
  const void* statistics = nullptr;
  Matrix grad_z, grad_mean, grad_logvar;  // each may be absent
};

enum class PairKernel : int { imq, rbf };

constexpr int kMaxScales = 16;

// The gradients are those of the value: contiguous, of the arithmetic type.
struct Mmd {
  DType dtype = DType::float32;
  int64_t x_rows = 0, y_rows = 0, cols = 0;
  Matrix x, y;
  PairKernel kernel = PairKernel::imq;
  int scales = 0;
  double parameters[kMaxScales] = {};  // of KernelTerm, C = 2 · cols · scale
  bool unbiased = true;
  void* value = nullptr;  // arithmetic type
  Matrix grad_x, grad_y;  // each may be absent

  // what the sum over pairs i < j of one set counts, and the constant that the diagonal adds
  UNIGEN_INLINE double within(int64_t n) const { return 2 / (double(n) * double(unbiased ? n - 1 : n)); }
  UNIGEN_INLINE double across() const { return -2 / (double(x_rows) * double(y_rows)); }
  UNIGEN_INLINE double diagonal(int64_t n) const { return unbiased ? 0 : scales / double(n); }
};

// targets = grad · gradients, of x and of y
struct MmdBackward {
  DType dtype = DType::float32;  // of the targets
  int64_t rows[2] = {}, cols = 0;
  const void* grad = nullptr;          // one number, arithmetic type
  const void* gradients[2] = {};       // as Mmd's
  Matrix targets[2];                   // each may be absent
};

#define UNIGEN_PAIRWISE_KERNELS(X)                        \
  X(total_correlation, TotalCorrelation)                  \
  X(total_correlation_backward, TotalCorrelationBackward) \
  X(mmd, Mmd)                                             \
  X(mmd_backward, MmdBackward)

}  // namespace unigen
