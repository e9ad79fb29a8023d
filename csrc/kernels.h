// The contract between the bindings, which know torch, and the kernels, which do not: what each kernel is given.
//
// A problem is a grid of rows × columns: the columns are reduced, the rows remain. Its dimensions are collapsed as far as
// the strides of all operands allow, so an operand is a pointer and a stride for each dimension left. Strides count
// elements and may be 0 (broadcast) or negative. All sizes and offsets are int64.
#pragma once

#include <cstdint>

#include "formulas/divergence.h"

namespace unigen {

constexpr int kMaxDims = 4;  // row dimensions, and column dimensions, after collapsing

enum class DType : int { float32, float64, bfloat16, float16 };

struct Grid {
  int64_t rows = 1, cols = 1;
  int row_dims = 0, col_dims = 0;          // the last dimension is the innermost
  int64_t row_size[kMaxDims] = {1, 1, 1, 1};  // row_size[0 .. row_dims)
  int64_t col_size[kMaxDims] = {1, 1, 1, 1};
};

struct Operand {
  void* data = nullptr;  // null: absent
  int64_t row[kMaxDims] = {};
  int64_t col[kMaxDims] = {};
};

// How rows become the result: none: `value` is an operand over the rows; else one number, sum · scale / denominator.
struct Reduction {
  bool reduce = false;
  double scale = 1, denominator = 1;
};

// Element operands have `dtype`; row operands and results have its arithmetic type: double for float64, else float.
struct Problem {
  Grid grid;
  DType dtype = DType::float32;
};

// ---- importance: columns are the K samples -------------------------------------------------------------------------

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

// ---- adversarial: one row, every logit a column --------------------------------------------------------------------

struct LogitItem : Problem {
  Operand logits;
  Operand grad_logits;  // backward only
  int term = 0;
  double count = 1;  // what this item's sum is divided by: its numel for "mean", else 1
};

// value = scale · sum_i (sum of term_i) / count_i; statistics [items, 4] contiguous (absent: null): mean of the term,
// share on the right side of 0, mean logit, mean probability; means over numel
struct LogitLoss {
  const LogitItem* items = nullptr;
  int64_t num_items = 0;
  DType dtype = DType::float32;
  double scale = 1;
  void* value = nullptr;
  void* statistics = nullptr;
};

struct LogitLossBackward {
  const LogitItem* items = nullptr;
  int64_t num_items = 0;
  DType dtype = DType::float32;
  double scale = 1;
  const void* grad = nullptr;  // one number
};

// elementwise: out = scale · term(logits), in the arithmetic type
struct LogitTerm : Problem {
  Operand logits;
  Operand out;
  int term = 0;
  double scale = 1;
};

struct LogitTermBackward : Problem {
  Operand grad;  // arithmetic type
  Operand logits;
  Operand grad_logits;
  int term = 0;
  double scale = 1;
};

// ---- divergence: columns are the event -----------------------------------------------------------------------------

// A dimension's KL below `dim_floor` counts as that (-inf: off), a row's below `row_floor` likewise (-inf: off);
// without gradient. `rows` keeps each row's KL before row_floor, weights and scale. value = row · weight, then `reduction`
// (its scale applies with reduce = false too).
struct GaussianKl : Problem {
  Operand mean, spread;
  Operand prior_mean, prior_spread;  // each may be absent: 0 for the mean, log-variance 0 for the spread
  Operand weights;                   // over the rows; may be absent
  Operand value;
  Operand rows;  // may be absent
  SpreadOptions options = {Spread::logvar, -HUGE_VAL, HUGE_VAL};
  double dim_floor = -HUGE_VAL, row_floor = -HUGE_VAL;
  Reduction reduction;

  bool has_prior() const { return prior_mean.data || prior_spread.data; }
};

struct GaussianKlBackward : Problem {
  Operand grad;  // over the rows; strides 0 for a reduced loss
  Operand mean, spread, prior_mean, prior_spread, weights;
  Operand rows;                                                            // present iff row_floor is finite
  Operand grad_mean, grad_spread, grad_prior_mean, grad_prior_spread;      // each may be absent: not wanted
  SpreadOptions options = {Spread::logvar, -HUGE_VAL, HUGE_VAL};
  double dim_floor = -HUGE_VAL, row_floor = -HUGE_VAL;
  Reduction reduction;

  bool has_prior() const { return prior_mean.data || prior_spread.data; }
};

// The dimensions keep their order: element (row, column) of `mean` has logical index j = row · cols + column, and its
// sample s the index (j / inner · samples + s) · inner + j % inner in z, which is contiguous, and in the noise.
struct SampleGaussian : Problem {
  Operand mean, spread;
  const int64_t* rng_state = nullptr;  // seed, offset: on the device
  void* z = nullptr;                   // dtype
  Operand kl;                          // over the rows; may be absent
  int64_t samples = 1, inner = 1;
  SpreadOptions options = {Spread::logvar, -HUGE_VAL, HUGE_VAL};
};

struct SampleGaussianBackward : Problem {
  // grad_z, of `dtype`, has strides of its own: over rows and columns, and one over the samples
  Operand grad_z;
  int64_t grad_z_sample_stride = 0;
  Operand grad_kl;  // over the rows; may be absent
  Operand mean, spread;
  const int64_t* rng_state = nullptr;
  Operand grad_mean, grad_spread;  // each may be absent
  int64_t samples = 1, inner = 1;
  SpreadOptions options = {Spread::logvar, -HUGE_VAL, HUGE_VAL};
};

// ---- likelihood: columns are the event -----------------------------------------------------------------------------

struct BernoulliLogProb : Problem {
  Operand logits, x;
  Operand value;
};

struct BernoulliLogProbBackward : Problem {
  Operand grad;  // over the rows
  Operand logits, x;
  Operand grad_logits, grad_x;  // each may be absent
};

// Every kernel: X(function, arguments)
#define UNIGEN_KERNELS(X)                                \
  X(weight_rows, WeightRows)                             \
  X(weight_rows_backward, WeightRowsBackward)            \
  X(weights, Weights)                                    \
  X(weights_backward, WeightsBackward)                   \
  X(logit_loss, LogitLoss)                               \
  X(logit_loss_backward, LogitLossBackward)              \
  X(logit_term, LogitTerm)                               \
  X(logit_term_backward, LogitTermBackward)              \
  X(gaussian_kl, GaussianKl)                             \
  X(gaussian_kl_backward, GaussianKlBackward)            \
  X(sample_gaussian, SampleGaussian)                     \
  X(sample_gaussian_backward, SampleGaussianBackward)    \
  X(bernoulli_log_prob, BernoulliLogProb)                \
  X(bernoulli_log_prob_backward, BernoulliLogProbBackward)

}  // namespace unigen
