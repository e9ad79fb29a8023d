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

#define UNIGEN_IMPORTANCE_KERNELS(X)          \
  X(weight_rows, WeightRows)                  \
  X(weight_rows_backward, WeightRowsBackward) \
  X(weights, Weights)                         \
  X(weights_backward, WeightsBackward)

}  // namespace unigen
