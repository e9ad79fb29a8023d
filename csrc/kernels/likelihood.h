// What the kernels of likelihood are given: columns are the event.
#pragma once

#include "../formulas/rows.h"
#include "problem.h"

namespace unigen {

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
