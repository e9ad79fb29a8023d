// What the kernels of likelihood are given: columns are the event.
#pragma once

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

#define UNIGEN_LIKELIHOOD_KERNELS(X)      \
  X(bernoulli_log_prob, BernoulliLogProb) \
  X(bernoulli_log_prob_backward, BernoulliLogProbBackward)

}  // namespace unigen
