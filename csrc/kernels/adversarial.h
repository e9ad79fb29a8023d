// What the kernels of adversarial are given: one row, every logit a column.
#pragma once

#include "problem.h"

namespace unigen {

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

#define UNIGEN_ADVERSARIAL_KERNELS(X)       \
  X(logit_loss, LogitLoss)                  \
  X(logit_loss_backward, LogitLossBackward) \
  X(logit_term, LogitTerm)                  \
  X(logit_term_backward, LogitTermBackward)

}  // namespace unigen
