// What the kernels of importance are given: columns are the K samples.
#pragma once

#include "problem.h"

namespace unigen {

enum class RowValue : int { log_mean_exp, minus_log_mean_exp, minus_surrogate, effective_sample_size, iwgan };

// value of each row; `statistics` over the rows, planes of grid.rows elements: shift, sum (, row loss for iwgan)
struct WeightRows : Problem {
  Operand log_w;
  Operand value;
  Operand statistics;  // absent for effective_sample_size
  RowValue kind = RowValue::log_mean_exp;
  double temperature = 1;
  Reduction reduction;
};

// d/d log_w of WeightRows: grad · scale / denominator times weight (log_mean_exp), -weight (the two bounds), iwgan_slope
struct WeightRowsBackward : Problem {
  Operand grad;  // over the rows; strides 0 for a reduced loss
  Operand log_w;
  Operand statistics;
  Operand grad_log_w;
  RowValue kind = RowValue::log_mean_exp;
  double temperature = 1;
  bool detach = true;
  Reduction reduction;
};

// softmax(log_w / temperature); `weights` has the arithmetic type
struct Weights : Problem {
  Operand log_w;
  Operand weights;
  double temperature = 1;
};

// weights · (grad - sum_k weights·grad) / temperature
struct WeightsBackward : Problem {
  Operand grad;     // arithmetic type
  Operand weights;  // arithmetic type
  Operand grad_log_w;
  double temperature = 1;
};

// formulas/importance.h has a struct for each
enum class EstimatorKind : int { power_bound, tvo, vimco, rws, log_variance, weighted_sum, diagnostics };

struct EstimatorOptions {
  EstimatorKind kind = EstimatorKind::power_bound;
  double power = 1, elbo_weight = 0, temperature = 1;
  const double* partition = nullptr;  // in the host's memory
  int points = 0;
};

// value[i] of each row, and what backward needs: `statistics`, planes of grid.rows elements
struct Estimators : Problem {
  Operand in[2];
  Operand value[2];
  Operand statistics;
  EstimatorOptions options;
  Reduction reduction;
};

// Gradients of `in` are `out`, absent where nobody asks. `value` is read by weighted_sum alone.
struct EstimatorsBackward : Problem {
  Operand grad[2];  // over the rows; strides 0 for a reduced loss
  Operand in[2];
  Operand value;
  Operand statistics;
  Operand out[2];
  EstimatorOptions options;
  Reduction reduction;
};

constexpr int64_t kLeastTail = 5, kMaxParetoPoints = 512;

// at how many points the likelihood of a tail of n is evaluated
UNIGEN_INLINE int64_t pareto_points(int64_t n) { return 30 + int64_t(::sqrt(double(n))); }

// The shape of each row's tail: `values` [rows, count + 1] descending, contiguous like `shapes`, both of the arithmetic type.
struct ParetoShape {
  DType dtype = DType::float32;
  int64_t rows = 0, count = 0;
  const void* values = nullptr;
  void* shapes = nullptr;
};

#define UNIGEN_IMPORTANCE_KERNELS(X)          \
  X(weight_rows, WeightRows)                  \
  X(weight_rows_backward, WeightRowsBackward) \
  X(weights, Weights)                         \
  X(weights_backward, WeightsBackward)        \
  X(estimators, Estimators)                   \
  X(estimators_backward, EstimatorsBackward)  \
  X(pareto_shape, ParetoShape)

}  // namespace unigen
