// The contract between the bindings, which know torch, and the kernels, which do not: what each kernel is given.
#pragma once

#include "kernels/adversarial.h"
#include "kernels/categorical.h"
#include "kernels/divergence.h"
#include "kernels/importance.h"
#include "kernels/likelihood.h"
#include "kernels/objectives.h"
#include "kernels/pairwise.h"

// Every kernel: X(function, arguments)
#define UNIGEN_KERNELS(X)       \
  UNIGEN_IMPORTANCE_KERNELS(X)  \
  UNIGEN_ADVERSARIAL_KERNELS(X) \
  UNIGEN_DIVERGENCE_KERNELS(X)  \
  UNIGEN_LIKELIHOOD_KERNELS(X)  \
  UNIGEN_CATEGORICAL_KERNELS(X) \
  UNIGEN_PAIRWISE_KERNELS(X)    \
  UNIGEN_OBJECTIVES_KERNELS(X)
