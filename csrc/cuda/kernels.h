// The CUDA kernels. No torch here.
#pragma once

#include "../kernels.h"
#include "launch.h"

namespace unigen::cuda {

// Each enqueues its work on the stream, without synchronising or allocating; returns null, or an error's text.
#define UNIGEN_DECLARE(function, Arguments) const char* function(const Arguments&, const Launch&);
UNIGEN_KERNELS(UNIGEN_DECLARE)
#undef UNIGEN_DECLARE

}  // namespace unigen::cuda
