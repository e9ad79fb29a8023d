// What the kernels of likelihood are given: columns are the event.
#pragma once

#include "divergence.h"
#include "problem.h"

namespace unigen {

// The bins of discretized data: half of their width, and the extreme levels, whose bins have no end.
struct Bins {
  double half = 0, low = 0, high = 0;
};

// Those of formulas/rows.h.
enum class Formula : int {
  gaussian_log_prob,
  laplace_log_prob,
  discretized_logistic_log_prob,
  negative_binomial_log_prob,
  zero_inflated_negative_binomial_log_prob,
  gaussian_kl_monte_carlo,
  gaussian_kl_entropy,  // the same without a mean of q
  bernoulli_kl,
  bernoulli_kl_half  // to Bernoulli(1/2)
};

constexpr int kMaxFormulaInputs = 5;

struct FormulaOptions {
  Formula formula = Formula::gaussian_log_prob;
  SpreadOptions spread = {Spread::logvar, -HUGE_VAL, HUGE_VAL};
  Bins bins = {};
  double eps = 0;          // of counts: added to mu and theta inside the logarithms
  bool data_slope = true;  // whether the slope in the first number is wanted
};

struct BernoulliLogProb : Problem {
  Operand logits, x;
  Operand value;
};

struct BernoulliLogProbBackward : Problem {
  Operand grad;  // over the rows
  Operand logits, x;
  Operand grad_logits, grad_x;  // each may be absent
};

// value of a row = sum of the formula · weight; then `reduction` (its scale applies with reduce = false too). The weights
// are elements of the arithmetic type, so that a reduced loss may have all dimensions as columns, whatever the rows were.
struct RowFormula : Problem {
  Operand in[kMaxFormulaInputs];  // as many as the formula has
  Operand weights;                // may be absent: 1
  Operand value;
  FormulaOptions options;
  Reduction reduction;
};

struct RowFormulaBackward : Problem {
  Operand grad;  // over the rows
  Operand in[kMaxFormulaInputs];
  Operand weights;
  Operand grad_in[kMaxFormulaInputs];  // each may be absent: not wanted
  FormulaOptions options;
  Reduction reduction;
};

#define UNIGEN_LIKELIHOOD_KERNELS(X)                       \
  X(bernoulli_log_prob, BernoulliLogProb)                  \
  X(bernoulli_log_prob_backward, BernoulliLogProbBackward) \
  X(row_formula, RowFormula)                               \
  X(row_formula_backward, RowFormulaBackward)

}  // namespace unigen
