// What the kernels of categorical are given: a grid of sites, each of which holds several numbers along one more dimension.
// Columns are the sites of an event.
#pragma once

#include "problem.h"

namespace unigen {

// Probabilities with a share of uniform ones: keep · softmax + floor.
struct Unimix {
  double keep, floor;

  UNIGEN_INLINE bool mixed() const { return floor > 0; }

  template <class T>
  UNIGEN_INLINE T operator()(T softmax) const {
    return softmax * T(keep) + T(floor);
  }
};

inline Unimix unimix_of(double share, int64_t classes) { return {1 - share, classes > 0 ? share / double(classes) : 0}; }

// An operand with a dimension more than the grid: its stride.
struct Vectors {
  Operand at;
  int64_t step = 0;
};

// KL(q || p) of each site; one below `site_floor` counts as that (-inf: off), a row's below `row_floor` likewise; without
// gradient. `rows` keeps each row's KL before row_floor and weights. value = row · weight, then `reduction`.
struct CategoricalKl : Problem {
  Vectors logits_q, logits_p;  // p may be absent: uniform
  Operand weights;             // over the rows; may be absent
  Operand value;
  Operand rows;  // may be absent
  int64_t classes = 0;
  Unimix unimix = {1, 0};
  double site_floor = -HUGE_VAL, row_floor = -HUGE_VAL;
  Reduction reduction;
  // one number each, written with a reduced value (absent: null): the same, and loss_scale times that
  void* copy = nullptr;
  void* loss = nullptr;
  double loss_scale = 1;
};

// The gradient of a row's KL is grad · factor + grad_own of its side, times weight, scale and 1 / denominator.
struct CategoricalKlBackward : Problem {
  Operand grad, grad_own_q, grad_own_p;  // over the rows; the own ones may be absent
  Vectors logits_q, logits_p;
  Operand weights;
  Operand rows;           // present iff row_floor is finite
  Vectors grad_q, grad_p;  // each may be absent: not wanted
  int64_t classes = 0;
  Unimix unimix = {1, 0};
  double site_floor = -HUGE_VAL, row_floor = -HUGE_VAL;
  double factor_q = 1, factor_p = 1;
  Reduction reduction;
};

// x: int64 classes; one that is `ignore_index` gives 0, without gradient
struct CategoricalLogProb : Problem {
  Vectors logits;
  Operand x;
  Operand value;
  int64_t classes = 0, ignore_index = 0;
};

struct CategoricalLogProbBackward : Problem {
  Operand grad;
  Vectors logits;
  Operand x;
  Vectors grad_logits;
  int64_t classes = 0, ignore_index = 0;
};

// params of a site: `mixtures` logits, then for each channel mixtures means, log-scales (, coefficients with 3 channels)
struct LogisticMixture : Problem {
  Vectors params, x;
  Operand value;
  int64_t mixtures = 0;
  int channels = 1;
};

struct LogisticMixtureBackward : Problem {
  Operand grad;
  Vectors params, x;
  Vectors grad_params, grad_x;  // each may be absent
  int64_t mixtures = 0;
  int channels = 1;
};

#define UNIGEN_CATEGORICAL_KERNELS(X)                          \
  X(categorical_kl, CategoricalKl)                             \
  X(categorical_kl_backward, CategoricalKlBackward)            \
  X(categorical_log_prob, CategoricalLogProb)                  \
  X(categorical_log_prob_backward, CategoricalLogProbBackward) \
  X(logistic_mixture, LogisticMixture)                         \
  X(logistic_mixture_backward, LogisticMixtureBackward)

}  // namespace unigen
