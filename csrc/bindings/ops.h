// The ops of unigen_fast/_ops.py: allocate, describe, launch. The same code for every device; a Backend has one static
// function for each of UNIGEN_KERNELS, which runs the kernel on the device of the tensor it is given.
#pragma once

#include "adversarial.h"
#include "categorical.h"
#include "divergence.h"
#include "importance.h"
#include "likelihood.h"
#include "objectives.h"
#include "pairwise.h"

// Every op: X(name); each has a function template of its name.
#define UNIGEN_OPS(X)       \
  UNIGEN_IMPORTANCE_OPS(X)  \
  UNIGEN_ADVERSARIAL_OPS(X) \
  UNIGEN_DIVERGENCE_OPS(X)  \
  UNIGEN_LIKELIHOOD_OPS(X)  \
  UNIGEN_CATEGORICAL_OPS(X) \
  UNIGEN_PAIRWISE_OPS(X)    \
  UNIGEN_OBJECTIVES_OPS(X)
