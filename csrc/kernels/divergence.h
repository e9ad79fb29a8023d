// What the kernels of divergence are given: columns are the event.
#pragma once

#include "problem.h"

namespace unigen {

enum class Spread : int { logvar, logstd, std };

// What a network's second output means, and the range its log-variance is clamped to (infinite: not at all).
struct SpreadOptions {
  Spread spread;
  double clamp_min, clamp_max;

  UNIGEN_INLINE bool clamped() const { return clamp_min > -HUGE_VAL || clamp_max < HUGE_VAL; }
};

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

#define UNIGEN_DIVERGENCE_KERNELS(X)          \
  X(gaussian_kl, GaussianKl)                  \
  X(gaussian_kl_backward, GaussianKlBackward) \
  X(sample_gaussian, SampleGaussian)          \
  X(sample_gaussian_backward, SampleGaussianBackward)

}  // namespace unigen
