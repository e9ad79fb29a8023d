// The form of a problem, as the bindings hand it to the kernels.
//
// A problem is a grid of rows × columns: the columns are reduced, the rows remain. Its dimensions are collapsed as far as
// the strides of all operands allow, so an operand is a pointer and a stride for each dimension left. Strides count
// elements and may be 0 (broadcast) or negative. All sizes and offsets are int64.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define UNIGEN_INLINE __host__ __device__ __forceinline__
#elif defined(__OPTIMIZE__)
#define UNIGEN_INLINE inline __attribute__((always_inline))
#else
#define UNIGEN_INLINE inline  // a build for debugging: what is inlined by force takes minutes to compile
#endif

namespace unigen {

constexpr int kMaxDims = 4;  // row dimensions, and column dimensions, after collapsing

enum class DType : int { float32, float64, bfloat16, float16 };

struct Grid {
  int64_t rows = 1, cols = 1;
  int row_dims = 0, col_dims = 0;          // the last dimension is the innermost
  int64_t row_size[kMaxDims] = {1, 1, 1, 1};  // row_size[0 .. row_dims)
  int64_t col_size[kMaxDims] = {1, 1, 1, 1};
};

struct Operand {
  void* data = nullptr;  // null: absent
  int64_t row[kMaxDims] = {};
  int64_t col[kMaxDims] = {};
};

// How rows become the result: none: `value` is an operand over the rows; else one number, sum · scale / denominator.
struct Reduction {
  bool reduce = false;
  double scale = 1, denominator = 1;
};

// Element operands have `dtype`; row operands and results have its arithmetic type: double for float64, else float.
struct Problem {
  Grid grid;
  DType dtype = DType::float32;
};

}  // namespace unigen
