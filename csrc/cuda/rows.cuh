// The driver of every kernel on a grid of rows × columns: which thread reads what, how rows are reduced, how launches
// are chosen. Shuffles and barriers are here and only here; an op gives the maths.
//
// A thread reads packs: R × C neighbouring elements, 16 bytes where strides and alignment allow. 1 × V where columns
// are contiguous, W × 1 where rows are (each element is then of a row of its own), 1 × 1 for anything else. `lanes`
// threads share a row (or R rows), from one thread to a whole block; where rows are few and long, several blocks.
//
// Results are the same in every run: all sums are taken in an order that depends on shapes, strides, alignment and the
// number of multiprocessors alone.
//
// An op is a struct derived from its arguments in ../kernels.h, with
//   E, T            element and arithmetic type;   kVector   elements of a pack at most;   kUnroll   packs in flight
//   kReduces        State, batch(), reduce(), merge(), finish(): a value for each row, which finish() returns as double
//   kWrites         Row, context(), write(): a value for each element, given the row's
//   kTotals         the rows' values are summed further where `reduction.reduce` says so
//   kBegins         begin(): a row's State before its columns; the first part's lanes share what a row has beside them
//   kRowPacks       whether it has W × 1 packs
//   Loaded<V>, load()   what it reads of a pack, in registers
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "../kernels/problem.h"
#include "launch.h"

#define UNIGEN_DEVICE __device__ __forceinline__

namespace unigen::cuda {

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks of a multiprocessor at least: 128 registers a thread
// of kernels with many numbers at once: doubles take two registers each
template <class Op>
constexpr int kResidentOf = sizeof(typename Op::T) == 8 ? 1 : kResident;
constexpr int kWarp = 32;
constexpr int kInnermost = kMaxDims - 1;
constexpr int64_t kMaxTotals = 4096;  // blocks whose sums a second launch adds up: doubles at the workspace's front
constexpr int64_t kMaxStates = 4096;  // partial states of split rows, behind them
constexpr int64_t kMaxBlocks = 1 << 30;
constexpr int64_t kStateBytes = (kWorkspaceBytes - kMaxTotals * int64_t(sizeof(double))) / kMaxStates;

template <class E>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class E>
using Arithmetic = typename ArithmeticOf<E>::type;

// how many elements make 16 bytes; doubles are read one by one, which is as fast
template <class E>
constexpr int kWidest = sizeof(E) == 8 ? 1 : 16 / int(sizeof(E));

UNIGEN_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }
UNIGEN_DEVICE double larger(double a, double b) { return ::fmax(a, b); }

struct Plus {
  template <class T>
  UNIGEN_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// drops NaN: the sums that follow carry it
struct Maximum {
  template <class T>
  UNIGEN_DEVICE T operator()(T a, T b) const {
    return larger(a, b);
  }
};

// ---- places --------------------------------------------------------------------------------------------------------

// a / b and a % b for a >= 0, b > 0; 64-bit division only where it must be
UNIGEN_DEVICE void divide(int64_t a, int64_t b, int64_t& quotient, int64_t& remainder) {
  if (b == 1) {
    quotient = a;
    remainder = 0;
  } else if (((a | b) >> 32) == 0) {
    const uint32_t q = uint32_t(a) / uint32_t(b);
    remainder = int64_t(uint32_t(a) - q * uint32_t(b));
    quotient = int64_t(q);
  } else {
    quotient = a / b;
    remainder = a - quotient * b;
  }
}

struct Index {
  int64_t i[kMaxDims];
};

// `dims`: how many dimensions, counted from the innermost, are not of size 1
UNIGEN_DEVICE Index split(int64_t flat, int dims, const int64_t (&size)[kMaxDims]) {
  static_assert(kMaxDims == 4, "written out, so that the index stays in registers");
  Index index = {};
  index.i[3] = flat;
  if (dims > 1) {
    divide(flat, size[3], index.i[2], index.i[3]);
    if (dims > 2) {
      divide(index.i[2], size[2], index.i[1], index.i[2]);
      if (dims > 3) divide(index.i[1], size[1], index.i[0], index.i[1]);
    }
  }
  return index;
}

UNIGEN_DEVICE int64_t dot(const Index& index, const int64_t (&stride)[kMaxDims]) {
  int64_t sum = 0;
#pragma unroll
  for (int d = 0; d < kMaxDims; ++d) sum += index.i[d] * stride[d];
  return sum;
}

// R rows from `row` on. Row operands are of the arithmetic type T.
struct Rows {
  int64_t row;
  Index index;

  template <class T>
  UNIGEN_DEVICE T& at(const Operand& o, int r) const {
    return static_cast<T*>(o.data)[dot(index, o.row) + r * o.row[kInnermost]];
  }
};

template <class E, int V>
struct alignas(sizeof(E) * V < 16 ? sizeof(E) * V : 16) Pack {
  E x[V];

  template <class T>
  UNIGEN_DEVICE T get(int v) const {
    return static_cast<T>(x[v]);
  }
};

// R × C elements from (rows.row, col) on
template <int R, int C>
struct Place {
  Rows rows;
  int64_t col;
  Index col_index;

  UNIGEN_DEVICE Place(const Rows& rows, int64_t col, const Grid& grid)
      : rows(rows), col(col), col_index(split(col, grid.col_dims, grid.col_size)) {}

  UNIGEN_DEVICE int64_t offset(const Operand& o) const { return dot(rows.index, o.row) + dot(col_index, o.col); }

  // `shift`: of a further dimension
  template <class E>
  UNIGEN_DEVICE Pack<E, R * C> load(const Operand& o, int64_t shift = 0) const {
    const E* data = static_cast<const E*>(o.data) + shift;
    Pack<E, R * C> pack;
    if (R * C > 1 && (R > 1 ? o.row : o.col)[kInnermost] == 0) {  // broadcast within the pack
      const E value = data[offset(o)];
#pragma unroll
      for (int v = 0; v < R * C; ++v) pack.x[v] = value;
    } else if constexpr (C > 1) {
      pack = *reinterpret_cast<const Pack<E, C>*>(data + dot(rows.index, o.row) + col);
    } else {
      pack = *reinterpret_cast<const Pack<E, R>*>(data + offset(o));
    }
    return pack;
  }

  template <class E, class T>
  UNIGEN_DEVICE void store(const Operand& o, const T (&value)[R * C]) const {
    Pack<E, R * C> pack;
#pragma unroll
    for (int v = 0; v < R * C; ++v) pack.x[v] = static_cast<E>(value[v]);
    const int64_t at = C > 1 ? dot(rows.index, o.row) + col : offset(o);
    *reinterpret_cast<Pack<E, R * C>*>(static_cast<E*>(o.data) + at) = pack;
  }
};

// ---- threads and reductions ----------------------------------------------------------------------------------------

enum class Phase : int {
  whole,    // each row by one group of lanes, from the elements to the end
  partial,  // a part of each row, up to its State in the workspace
  merge     // from the States of a row's parts to the end
};

struct Tiling {
  int64_t row_tiles = 0;  // a tile is the rows of a block
  int64_t parts = 1;      // ranges of columns, each for a block of its own
  int64_t part_cols = 0;
  int64_t states = 1;       // phases partial and merge: States of a row
  int lane_bits = 0;        // lanes of a row: 2^lane_bits
  bool transposed = false;  // whether neighbouring threads have neighbouring rows, not columns
  Phase phase = Phase::whole;
};

// What a launch writes that is no result.
struct Scratch {
  double* totals;
  void* states;
};

// The lanes that share a row. Every thread of a block calls reduce together.
struct Group {
  int thread, lanes, tile_rows, row, lane;
  bool transposed;

  UNIGEN_DEVICE explicit Group(const Tiling& tile)
      : thread(int(threadIdx.x)),
        lanes(1 << tile.lane_bits),
        tile_rows(kThreads >> tile.lane_bits),
        transposed(tile.transposed) {
    row = transposed ? thread & (tile_rows - 1) : thread >> tile.lane_bits;
    lane = transposed ? thread / tile_rows : thread & (lanes - 1);
  }

  // Every lane gets the result, and all of them the same bits.
  template <class T, class Combine>
  UNIGEN_DEVICE T reduce(T x, Combine combine) const {
    if (!transposed) {
      for (int step = (lanes < kWarp ? lanes : kWarp) / 2; step > 0; step /= 2)
        x = combine(x, __shfl_xor_sync(~0u, x, step));
      if (lanes <= kWarp) return x;
    } else if (lanes == 1) {
      return x;
    }
    __shared__ T parts[kThreads];
    if (transposed || thread % kWarp == 0) parts[transposed ? thread : thread / kWarp] = x;
    __syncthreads();
    const int first = transposed ? row : row * (lanes / kWarp);
    const int stride = transposed ? tile_rows : 1, count = transposed ? lanes : lanes / kWarp;
    x = parts[first];
    for (int i = 1; i < count; ++i) x = combine(x, parts[first + i * stride]);
    __syncthreads();
    return x;
  }

  // Several at once: within a warp their shuffles overlap.
  template <class T, int N, class Combine>
  UNIGEN_DEVICE void reduce_each(T (&x)[N], Combine combine) const {
    if (!transposed && lanes <= kWarp) {
      for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] = combine(x[n], __shfl_xor_sync(~0u, x[n], step));
      }
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] = reduce(x[n], combine);
    }
  }

  // all threads of a block as one group
  static UNIGEN_DEVICE Group block() {
    Tiling tile;
    static_assert(kThreads == 256, "lane_bits");
    tile.lane_bits = 8;
    return Group(tile);
  }
};

// All threads of all blocks of a cluster; what they wrote before, each of them sees after.
UNIGEN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

struct NoState {};

// The sum of a row: packs are added in T, their sums in double.
struct Sum {
  double value = 0;
};

// What an op leaves as it is.
struct OpBase {
  using State = NoState;
  static constexpr bool kReduces = false, kWrites = false, kTotals = false, kBegins = false, kRowPacks = true;

  UNIGEN_DEVICE void reduce(Sum& sum, const Group& group) const { sum.value = group.reduce(sum.value, Plus()); }
  UNIGEN_DEVICE void merge(Sum& sum, const Sum& other) const { sum.value += other.value; }
};

// ---- kernels -------------------------------------------------------------------------------------------------------

// packs of U steps: the loads of all of them are issued before the first is used
template <class Op, int R, int C>
struct Batch {
  static constexpr int U = Op::kUnroll;
  typename Op::template Loaded<R * C> x[U];
  bool valid[U];

  UNIGEN_DEVICE void load(const Op& op, const Rows& rows, int64_t col, int64_t end, int64_t step) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      valid[u] = col + u * step < end;
      if (valid[u]) x[u] = op.load(Place<R, C>(rows, col + u * step, op.grid));
    }
  }

  template <class Row>
  UNIGEN_DEVICE void write(const Op& op, const Rows& rows, int64_t col, int64_t step, const Row (&row)[R]) const {
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (valid[u]) op.write(Place<R, C>(rows, col + u * step, op.grid), row, x[u]);
  }
};

template <class Op, int R, int C>
__global__ void __launch_bounds__(kThreads, kResident)
    rows_kernel(const __grid_constant__ Op op, const __grid_constant__ Tiling tile,
                const __grid_constant__ Scratch scratch) {
  using State = typename Op::State;
  const Group group(tile);
  const int64_t step = int64_t(group.lanes) * C;
  double total = 0;
  for (int64_t block = blockIdx.x; block < tile.row_tiles * tile.parts; block += gridDim.x) {
    int64_t row_tile, part;
    divide(block, tile.parts, row_tile, part);
    const int64_t row = (row_tile * group.tile_rows + group.row) * R;
    const bool live = row < op.grid.rows;
    const Rows rows{row, split(live ? row : 0, op.grid.row_dims, op.grid.row_size)};
    const int64_t begin = part * tile.part_cols + int64_t(group.lane) * C;
    const int64_t part_end = (part + 1) * tile.part_cols;
    const int64_t end = !live ? 0 : part_end < op.grid.cols ? part_end : op.grid.cols;
    State state[R];
    Batch<Op, R, C> batch;

    if constexpr (Op::kReduces) {
      if (tile.phase == Phase::merge) {
        if (live) {
          const State* states = static_cast<const State*>(scratch.states) + row * tile.states;
#pragma unroll
          for (int r = 0; r < R; ++r)
            for (int64_t s = group.lane; s < tile.states; s += group.lanes)
              op.merge(state[r], states[r * tile.states + s]);
        }
      } else {
        if constexpr (Op::kBegins) {
#pragma unroll
          for (int r = 0; r < R; ++r)
            if (live) op.begin(rows, r, state[r], group, part == 0 && blockIdx.y == 0);
        }
        for (int64_t col = begin; col < end; col += step * Batch<Op, R, C>::U) {
          batch.load(op, rows, col, end, step);
          op.template batch<R, C>(state, batch.x, batch.valid,
                                  [&](int u) { return Place<R, C>(rows, col + u * step, op.grid); });
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) op.reduce(state[r], group);
      if (live && group.lane == 0 && blockIdx.y == 0) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (tile.phase == Phase::partial) {
            static_cast<State*>(scratch.states)[(row + r) * tile.states + part] = state[r];
          } else {
            total += op.finish(rows, r, state[r]);
          }
        }
      }
    }

    if constexpr (Op::kWrites) {
      if (live && tile.phase != Phase::partial) {
        typename Op::Row context[R];
#pragma unroll
        for (int r = 0; r < R; ++r) context[r] = op.context(rows, r, state[r]);
        // after a reduction the registers still hold a row of one batch
        const bool held = Op::kReduces && tile.phase == Phase::whole && tile.part_cols <= step * Batch<Op, R, C>::U;
        for (int64_t col = begin; col < end; col += step * Batch<Op, R, C>::U) {
          if (!held) batch.load(op, rows, col, end, step);
          batch.write(op, rows, col, step, context);
        }
      }
    }
  }

  if constexpr (Op::kTotals) {
    if (op.reduction.reduce && tile.phase != Phase::partial) {
      total = Group::block().reduce(total, Plus());
      if (threadIdx.x == 0) {
        if (gridDim.x == 1) {
          *static_cast<typename Op::T*>(op.value.data) =
              static_cast<typename Op::T>(total * op.reduction.scale / op.reduction.denominator);
        } else {
          scratch.totals[blockIdx.x] = total;
        }
      }
    }
  }
}

// Estimators: several sweeps over each row, one group of lanes for it. `op` has, beside the estimator, load(rows, col, x),
// save(rows, r, plane, x) and finish(rows, values).
template <class Op>
__global__ void __launch_bounds__(kThreads, kResident)
    sweeps_kernel(const __grid_constant__ Op op, const __grid_constant__ Tiling tile, const __grid_constant__ Scratch scratch) {
  using T = typename Op::T;
  using F = typename Op::F;
  constexpr int kValues = F::kValues ? F::kValues : 1;
  const Group group(tile);
  const F f = op.estimator();
  double totals[kValues] = {};
  for (int64_t block = blockIdx.x; block < tile.row_tiles; block += gridDim.x) {
    const int64_t row = block * group.tile_rows + group.row;
    const bool live = row < op.grid.rows;
    const Rows rows{row, split(live ? row : 0, op.grid.row_dims, op.grid.row_size)};
    const int64_t end = live ? op.grid.cols : 0;
    T x[F::kIn], kept[F::kKept], first = -T(HUGE_VAL), second = first;
    for (int64_t col = group.lane; col < end; col += group.lanes) {
      op.load(rows, col, x);
      const T key = f.key(x);
      if constexpr (F::kSecond) second = larger(second, key < first ? key : first);
      first = larger(first, key);
    }
    const T largest = group.reduce(first, Maximum());
    if constexpr (F::kSecond) {  // another lane may have the same one
      const int count = group.reduce(first == largest ? 1 : 0, Plus());
      second = group.reduce(first == largest ? second : first, Maximum());
      if (count > 1) second = largest;
    }
    f.open(largest, second, kept);
    const int sweeps = f.sweeps();
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      T sums[F::kSums], planes[F::kSweepPlanes ? F::kSweepPlanes : 1];
#pragma unroll
      for (int s = 0; s < F::kSums; ++s) sums[s] = 0;
      for (int64_t col = group.lane; col < end; col += group.lanes) {
        T terms[F::kSums];
        op.load(rows, col, x);
        f.terms(sweep, kept, x, terms);
#pragma unroll
        for (int s = 0; s < F::kSums; ++s) sums[s] += terms[s];
      }
#pragma unroll
      for (int s = 0; s < F::kSums; ++s) sums[s] = T(group.reduce(double(sums[s]), Plus()));
      f.close(sweep, sums, kept, planes);
      if (live && group.lane == 0) {
#pragma unroll
        for (int p = 0; p < F::kSweepPlanes; ++p) op.save(rows, F::kPlanes + sweep * F::kSweepPlanes + p, planes[p]);
      }
    }
    if (live && group.lane == 0) {
      T values[kValues];
#pragma unroll
      for (int p = 0; p < F::kPlanes; ++p) op.save(rows, p, kept[p]);
      f.values(kept, values);
#pragma unroll
      for (int i = 0; i < F::kValues; ++i) {
        if (!op.reduction.reduce) rows.at<T>(op.value[i], 0) = values[i] * T(op.reduction.scale);
        totals[i] += double(values[i]);
      }
    }
  }
  if (!op.reduction.reduce) return;
#pragma unroll
  for (int i = 0; i < F::kValues; ++i) {
    const double total = Group::block().reduce(totals[i], Plus());
    if (threadIdx.x == 0) scratch.totals[i * gridDim.x + blockIdx.x] = total;
  }
}

// one block: the sum of the blocks' totals, in one order
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    total_kernel(const double* totals, int count, double scale, double denominator, T* value) {
  double total = 0;
  for (int i = int(threadIdx.x); i < count; i += kThreads) total += totals[i];
  total = Group::block().reduce(total, Plus());
  if (threadIdx.x == 0) *value = static_cast<T>(total * scale / denominator);
}

// ---- launches ------------------------------------------------------------------------------------------------------

// f(E()) for the element type
template <class F>
const char* dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::float64: return f(double());
    case DType::bfloat16: return f(__nv_bfloat16());
    case DType::float16: return f(__half());
    default: return f(float());
  }
}

template <class... Parameters, class... Given>
const char* start(void (*kernel)(Parameters...), int64_t blocks, int64_t blocks_y, const Launch& launch,
                  const Given&... given) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks), unsigned(blocks_y));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, given...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// of the current device
inline bool has_clusters() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// `size` blocks beside each other are a cluster
template <class... Parameters, class... Given>
const char* start_clusters(void (*kernel)(Parameters...), int64_t blocks, int64_t size, const Launch& launch,
                           const Given&... given) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, given...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `low` if that is above `high`
inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  x = x > high ? high : x;
  return x < low ? low : x;
}

// Puts the innermost dimension last in the arrays, and strides of 0 where there is but one element. Counts the
// dimensions from the innermost to the last that has more.
inline void align(Grid& grid, std::initializer_list<Operand*> operands) {
  const auto shift = [](int dims, int64_t (&x)[kMaxDims], int64_t fill) {
    for (int to = kInnermost; to >= 0; --to) {
      const int from = to - (kMaxDims - dims);
      x[to] = from >= 0 ? x[from] : fill;
    }
  };
  shift(grid.row_dims, grid.row_size, 1);
  shift(grid.col_dims, grid.col_size, 1);
  for (Operand* o : operands) {
    shift(grid.row_dims, o->row, 0);
    shift(grid.col_dims, o->col, 0);
    for (int d = 0; d < kMaxDims; ++d) {
      if (grid.row_size[d] == 1) o->row[d] = 0;
      if (grid.col_size[d] == 1) o->col[d] = 0;
    }
  }
  const auto used = [](const int64_t (&size)[kMaxDims]) {
    int dims = kMaxDims;
    while (dims > 0 && size[kMaxDims - dims] == 1) --dims;
    return dims;
  };
  grid.row_dims = used(grid.row_size);
  grid.col_dims = used(grid.col_size);
}

// An operand that a kernel reads or writes pack by pack.
struct Element {
  const Operand* operand;
  int bytes;  // of an element
  bool output = false;

  // whether packs of v along a dimension with these strides, the others being `other`, are one aligned access
  bool packs(int v, const int64_t (&along)[kMaxDims], const int64_t (&other)[kMaxDims]) const {
    if (!operand->data || (along[kInnermost] == 0 && !output)) return true;
    const int64_t unit = int64_t(bytes) * v < 16 ? int64_t(bytes) * v : 16;
    bool fits = along[kInnermost] == 1 && reinterpret_cast<uintptr_t>(operand->data) % uint64_t(unit) == 0;
    for (int d = 0; d < kMaxDims; ++d) fits = fits && (d == kInnermost || along[d] % v == 0) && other[d] % v == 0;
    return fits;
  }
};

// a thread with more rows than this has too many registers in use
template <class Op>
constexpr int kRowVector = !Op::kRowPacks ? 1 : Op::kVector < 4 ? Op::kVector : 4;

struct Packs {
  int rows = 1, cols = 1;
};

// The largest packs that all operands allow.
template <class Op>
Packs choose_packs(const Grid& grid, std::initializer_list<Element> elements) {
  constexpr int V = Op::kVector, W = kRowVector<Op>;
  bool cols = V > 1 && grid.cols > 1 && grid.cols % V == 0 && grid.col_size[kInnermost] == grid.cols;
  bool rows = W > 1 && grid.row_size[kInnermost] % W == 0;
  for (const Element& e : elements) {
    cols = cols && e.packs(V, e.operand->col, e.operand->row);
    rows = rows && e.packs(W, e.operand->row, e.operand->col);
  }
  return cols ? Packs{1, V} : rows ? Packs{W, 1} : Packs{1, 1};
}

struct Plan {
  Tiling tile;
  Packs packs;
  int64_t blocks = 0, blocks_y = 1;
  bool reduces, totals;
};

// `first` tells which direction is contiguous. `reduces`: whether rows have values at all in this call; `totals`:
// whether these are summed further.
template <class Op>
Plan make_plan(const Op& op, Packs packs_of, const Operand& first, bool reduces, bool totals, const Launch& launch) {
  constexpr int U = Op::kUnroll;
  const Grid& grid = op.grid;
  const int64_t multiprocessors = launch.multiprocessors;
  const auto distance = [](int64_t stride) { return stride == 0 ? INT64_MAX : stride < 0 ? -stride : stride; };
  Plan plan;
  plan.packs = packs_of;
  plan.reduces = reduces;
  plan.totals = totals;
  Tiling& tile = plan.tile;
  tile.transposed = packs_of.cols == 1 && (packs_of.rows > 1 || grid.cols == 1 ||
                                           distance(first.row[kInnermost]) < distance(first.col[kInnermost]));

  const int64_t rows = divide_up(grid.rows, packs_of.rows), packs = divide_up(grid.cols, packs_of.cols);
  const int64_t crowd = multiprocessors * 1024;  // threads that keep memory busy
  int64_t lanes = 1;
  if (tile.transposed) {
    int64_t beside = 8;  // threads along the rows at least: 32 bytes of fp32
    while (beside < kWarp && beside < rows) beside *= 2;
    while (lanes * beside < kThreads && packs > U * lanes && rows * lanes < crowd) lanes *= 2;
  } else {
    while (lanes < kWarp && packs > 2 * lanes) lanes *= 2;
    while (lanes < kThreads && packs > U * lanes &&
           (packs > 16 * lanes || rows * lanes < crowd || (Op::kReduces && Op::kWrites))) {
      lanes *= 2;
    }
  }
  while ((1 << tile.lane_bits) < lanes) ++tile.lane_bits;
  tile.row_tiles = divide_up(rows, kThreads / lanes);

  int64_t parts = 1;
  if (tile.row_tiles > 0) {
    const int64_t batches = divide_up(packs, lanes * U);
    if (!reduces) {
      parts = clamp(batches, 1, divide_up(multiprocessors * 32, tile.row_tiles));
    } else if (batches > (totals ? 2 : 4) && tile.row_tiles < 2 * multiprocessors) {
      // worth the second launch that merges the parts
      parts = clamp(divide_up(batches, 2), 1, divide_up(multiprocessors * 4, tile.row_tiles));
      parts = clamp(parts, 1, kMaxStates / grid.rows);
    }
  }
  const int64_t part_packs = clamp(divide_up(packs, parts), 1, packs);
  tile.parts = divide_up(packs, part_packs);
  if (tile.parts < 1) tile.parts = 1;
  tile.part_cols = part_packs * packs_of.cols;
  tile.states = tile.parts;

  const int64_t tiles = tile.row_tiles * tile.parts;
  plan.blocks = tiles < kMaxBlocks ? tiles : kMaxBlocks;
  if (totals) {
    plan.blocks = clamp(tiles, 1, kMaxTotals);
    // a second launch takes longer than a few tiles by one block
    if (tile.parts == 1 && tile.row_tiles * divide_up(packs, lanes * U) <= 4) plan.blocks = 1;
  }
  return plan;
}

template <class Op>
const char* start_rows(const Op& op, const Plan& plan, const Launch& launch) {
  const Scratch scratch{static_cast<double*>(launch.workspace), static_cast<double*>(launch.workspace) + kMaxTotals};
  constexpr int V = Op::kVector, W = kRowVector<Op>;
  const auto run = [&](auto kernel) {
    return start(kernel, plan.blocks, plan.blocks_y, launch, op, plan.tile, scratch);
  };
  if constexpr (V > 1) {
    if (plan.packs.cols > 1) return run(rows_kernel<Op, 1, V>);
  }
  if constexpr (W > 1) {
    if (plan.packs.rows > 1) return run(rows_kernel<Op, W, 1>);
  }
  return run(rows_kernel<Op, 1, 1>);
}

template <class Op>
const char* run_plan(const Op& op, Plan plan, const Launch& launch) {
  static_assert(sizeof(typename Op::State) <= kStateBytes, "a State has no room in the workspace");
  if (plan.blocks == 0 || (Op::kWrites && op.grid.cols == 0)) return nullptr;
  const bool split_rows = plan.reduces && plan.tile.parts > 1;
  if (split_rows) plan.tile.phase = Phase::partial;
  if (const char* error = start_rows(op, plan, launch)) return error;
  if (split_rows) {
    plan.tile.phase = Phase::merge;
    plan.blocks_y = 1;
    if constexpr (!Op::kWrites) {  // few rows, a State for each of their parts: one block does them all
      Tiling tile;
      tile.phase = Phase::merge;
      tile.states = plan.tile.parts;
      while ((1 << tile.lane_bits) < kWarp && (1 << tile.lane_bits) < tile.states) ++tile.lane_bits;
      tile.row_tiles = divide_up(op.grid.rows, kThreads >> tile.lane_bits);
      plan.tile = tile;
      plan.packs = {};
      plan.blocks = 1;
    }
    return start_rows(op, plan, launch);
  }
  if constexpr (Op::kTotals) {
    if (plan.totals && plan.blocks > 1) {
      return start(total_kernel<typename Op::T>, 1, 1, launch, static_cast<const double*>(launch.workspace),
                   int(plan.blocks), op.reduction.scale, op.reduction.denominator,
                   static_cast<typename Op::T*>(op.value.data));
    }
  }
  return nullptr;
}

// Runs an estimator whose operands are aligned.
template <class Op>
const char* run_sweeps(const Op& op, const Launch& launch) {
  constexpr int kValues = Op::F::kValues;
  const Grid& grid = op.grid;
  const auto distance = [](int64_t stride) { return stride == 0 ? INT64_MAX : stride < 0 ? -stride : stride; };
  Tiling tile;
  tile.transposed = distance(op.in[0].row[kInnermost]) < distance(op.in[0].col[kInnermost]);
  const int64_t most = tile.transposed ? kThreads / kWarp : kThreads, few = tile.transposed ? 16 : 4;
  while ((int64_t(1) << tile.lane_bits) < most && (few << tile.lane_bits) < grid.cols) ++tile.lane_bits;
  tile.row_tiles = divide_up(grid.rows, kThreads >> tile.lane_bits);
  const int64_t blocks = clamp(tile.row_tiles, op.reduction.reduce ? 1 : 0, kMaxTotals / 2);
  if (blocks == 0) return nullptr;
  double* const totals = static_cast<double*>(launch.workspace);
  if (const char* error = start(sweeps_kernel<Op>, blocks, 1, launch, op, tile, Scratch{totals, nullptr})) return error;
  for (int i = 0; i < kValues && op.reduction.reduce; ++i) {
    const char* error = start(total_kernel<typename Op::T>, 1, 1, launch, static_cast<const double*>(totals + i * blocks),
                              int(blocks), op.reduction.scale, op.reduction.denominator,
                              static_cast<typename Op::T*>(op.value[i].data));
    if (error) return error;
  }
  return nullptr;
}

// Runs an op whose operands are aligned. `elements`: what it reads and writes pack by pack, the main input first.
template <class Op>
const char* run_rows(const Op& op, std::initializer_list<Element> elements, const Launch& launch, bool totals = false) {
  const Packs packs = choose_packs<Op>(op.grid, elements);
  return run_plan(op, make_plan(op, packs, *elements.begin()->operand, Op::kReduces, totals, launch), launch);
}

}  // namespace unigen::cuda
