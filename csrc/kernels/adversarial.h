// What the kernels of adversarial are given: one row, every logit a column.
#pragma once

#include "problem.h"

namespace unigen {

// The terms, numbered as in unigen_fast/reference/adversarial.py.
enum class Term : int {
  logistic_real,
  logistic_fake,
  saturating,
  hinge_real,
  hinge_fake,
  linear,
  identity,
  least_squares_real,
  least_squares_fake,
  least_squares_minus,
  kl_real,
  kl_fake,
  reverse_kl_real,
  reverse_kl_fake,
  pearson_fake,
  expm1_real,
  neyman_fake,
  hellinger_fake,
  js_real,
  js_fake
};

constexpr int kTerms = 20;

// How the logits of a tensor hang together. averages: each less the mean of the other side's tensor. ratios: each fake
// one times its density ratio r = exp(l) / mean of exp(l), a constant.
enum class Coupling : int { none, averages, ratios };

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

constexpr int kCoupledColumns = 6;

// The first `reals` items are real, the others fake. statistics [items, kCoupledColumns] contiguous: those of LogitLoss (all
// but the first 0 unless `return_stats`), then what backward needs: an item's mean logit and mean slope, or (fake items; 0 for others) its
// maximum m and 1 / mean of exp(l - m).
struct CoupledLogitLoss : LogitLoss {
  int64_t reals = 0;
  int coupling = 0;
  bool return_stats = false;
};

struct CoupledLogitLossBackward : LogitLossBackward {
  int64_t reals = 0;
  int coupling = 0;
  const void* statistics = nullptr;
};

// whose summary item i's coupling reads: its own, or that of its counterpart
UNIGEN_INLINE int64_t coupled_with(int coupling, int64_t i, int64_t reals) {
  return Coupling(coupling) != Coupling::averages ? i : i < reals ? i + reals : i - reals;
}
// real logits have no ratios
UNIGEN_INLINE Coupling coupling_of(int coupling, int64_t i, int64_t reals) {
  return Coupling(coupling) == Coupling::ratios && i < reals ? Coupling::none : Coupling(coupling);
}

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

// IWGAN's row loss within each group of n samples of one label. statistics [2n + 1] contiguous: the samples' weights, the
// losses of their groups, what the sum over the groups is multiplied by.
struct GroupedWeights : Problem {
  Operand logits, labels;  // over one row of n columns; labels are int64
  double temperature = 1;
  bool mean = false;
  void* value = nullptr;
  void* statistics = nullptr;
  void* workspace = nullptr;  // kGroupedBytes for each of n + 1 samples
};
constexpr int64_t kGroupedBytes = 80;

struct GroupedWeightsBackward : Problem {
  Operand logits;
  Operand weights, losses;  // of the statistics: arithmetic type
  Operand grad_logits;
  const void* grad = nullptr;    // one number
  const void* factor = nullptr;  // one number
  double temperature = 1;
  bool detach = true;
};

#define UNIGEN_ADVERSARIAL_KERNELS(X)                      \
  X(logit_loss, LogitLoss)                                 \
  X(logit_loss_backward, LogitLossBackward)                \
  X(logit_term, LogitTerm)                                 \
  X(logit_term_backward, LogitTermBackward)                \
  X(coupled_logit_loss, CoupledLogitLoss)                  \
  X(coupled_logit_loss_backward, CoupledLogitLossBackward) \
  X(grouped_weights, GroupedWeights)                       \
  X(grouped_weights_backward, GroupedWeightsBackward)

}  // namespace unigen
