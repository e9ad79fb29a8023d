// The drivers of the CPU kernels: the only place with loops over rows and columns, threads, staging and reductions. A
// formula comes in as a function object of vectors (Vec<float> or Vec<double>) and knows nothing of layouts and dtypes.
//
// Lanes run along the columns where these are contiguous, and along the rows where those are (`[K, B]` reduced over K) or
// where a row has only a few columns. Whatever is then not contiguous, or not of the arithmetic type, goes through a small
// buffer. Loops work on copies of function objects: what is written could change the members of any other, for all the
// compiler knows. Work is cut into units by shape alone, and sums are taken in the order of units: results have the same bits
// whatever the number of threads.
#pragma once

#include "../kernels/problem.h"
#include "parallel.h"
#include "vec.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

// a lambda that is always inlined: its captured vectors stay in registers
#if defined(__OPTIMIZE__)
#define UNIGEN_FORCED __attribute__((always_inline))
#else
#define UNIGEN_FORCED
#endif
// a function that exists once: code that runs once per call or per row is not worth copying
#define UNIGEN_NOINLINE __attribute__((noinline))

template <class T>
constexpr int kChunk = 2048 / int(sizeof(T));  // elements staged at a time
constexpr int64_t kUnit = 8192;                // elements that are worth handing to a thread, with as many more
constexpr int64_t kBatch = 4096;               // elements to finish before the next ones are read
constexpr int64_t kMaxUnits = 1024;
constexpr int64_t kFewRows = 64;      // with fewer, long rows are split
constexpr int kElementsAhead = 2048;  // how far operands are fetched ahead
constexpr int kRowsAhead = 8;         // how far short rows are fetched ahead where memory is what they wait for
constexpr int64_t kStreamedBytes = 24 << 20;  // results that few caches would keep, so that they go past them
constexpr int kFlush = 64;            // vectors added up in the arithmetic type before the sum goes on in double
constexpr int kAxisDims = 2 * kMaxDims;

UNIGEN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
UNIGEN_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
UNIGEN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
UNIGEN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- tasks ---------------------------------------------------------------------------------------------------------

// task(begin, end) for pieces of [0, count)
template <class Task>
void in_parallel(const Parallel& parallel, int64_t count, int64_t grain, const Task& task) {
  const auto range = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Task*>(context))(begin, end); };
  void* context = const_cast<void*>(static_cast<const void*>(&task));
  if (count <= grain) {
    if (count > 0) range(0, count, context);
  } else {
    parallel.run(0, count, grain, range, context);
  }
}

// how many tasks of so many steps are worth a thread
UNIGEN_INLINE int64_t grain_of(int64_t steps) { return larger(1, (1 << 15) / larger(1, steps)); }

// ---- staging -------------------------------------------------------------------------------------------------------

// an operand to stage: dtype of its elements, and what an absent one counts as
struct Array {
  Operand operand;
  DType dtype;
  double fill = 0;
};

UNIGEN_INLINE Array elements(const Operand& operand, const Problem& problem) { return {operand, problem.dtype}; }
UNIGEN_INLINE DType arithmetic_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
UNIGEN_INLINE Array arithmetic(const Operand& operand, const Problem& problem, double fill = 0) {
  return {operand, arithmetic_dtype(problem.dtype), fill};
}
// An array of numbers of the rows from `first` on, as an operand over the rows (of which only those are then read).
template <class T>
UNIGEN_INLINE Array rows_from(const T* array, int64_t first, const Grid& grid) {
  Operand operand;
  operand.data = reinterpret_cast<void*>(reinterpret_cast<intptr_t>(array) - first * intptr_t(sizeof(T)));
  int64_t stride = 1;
  for (int d = grid.row_dims - 1; d >= 0; --d) {
    operand.row[d] = stride;
    stride *= grid.row_size[d];
  }
  return {operand, sizeof(T) == 8 ? DType::float64 : DType::float32};
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

UNIGEN_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
UNIGEN_INLINE float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

template <class T>
UNIGEN_INLINE T decode(T x) {
  return x;
}
UNIGEN_INLINE float decode(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
UNIGEN_INLINE float decode(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);  // exact, denormals too
  return bits_float(sign | (magnitude < 0x0f800000 ? finite : magnitude | 0x7f800000));
}

template <class T>
UNIGEN_INLINE void encode(T x, T* target) {
  *target = x;
}
// to nearest, ties to even
UNIGEN_INLINE void encode(float x, BFloat16* target) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  target->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
UNIGEN_INLINE void encode(float x, Float16* target) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t denormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? denormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  target->bits = uint16_t(sign | (magnitude < 0x47800000 ? finite : special));
}

template <class T, class S>
void gather(const S* source, int64_t stride, int64_t n, T* target) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) target[i] = decode(source[i]);
  } else if (stride == 0) {
    const T x = decode(*source);
    for (int64_t i = 0; i < n; ++i) target[i] = x;
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = decode(source[i * stride]);
  }
}
template <class T, class S>
void scatter(const T* source, S* target, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) encode(source[i], target + i);
  } else {
    for (int64_t i = 0; i < n; ++i) encode(source[i], target + i * stride);
  }
}

// body(pointer to the first element, as its storage type)
template <class T, class Body>
UNIGEN_INLINE void with_storage(DType dtype, void* data, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::bfloat16) return body(static_cast<BFloat16*>(data));
    if (dtype == DType::float16) return body(static_cast<Float16*>(data));
  }
  body(static_cast<T*>(data));
}

// Dimensions of one operand, collapsed as far as its own strides allow.
struct Strided {
  int dims = 0;
  int64_t size[kAxisDims], stride[kAxisDims];

  void append(int64_t n, int64_t s) {
    if (n == 1) return;
    if (dims && stride[dims - 1] == s * n) {
      size[dims - 1] *= n;
      stride[dims - 1] = s;
    } else {
      size[dims] = n;
      stride[dims++] = s;
    }
  }

  // in elements, of the place with this index
  UNIGEN_INLINE int64_t offset(int64_t index) const {
    int64_t sum = 0;
#pragma GCC unroll 1  // rarely more than one dimension
    for (int d = dims - 1; d > 0; --d) {
      sum += index % size[d] * stride[d];
      index /= size[d];
    }
    return dims ? sum + index * stride[0] : 0;
  }
};

// which dimensions lanes, or steps, run over; the last one is innermost
enum class Axis : int { none, rows, cols, rows_cols, cols_rows };

UNIGEN_NOINLINE inline Strided strided(const Grid& grid, const Operand& operand, Axis axis) {
  Strided s;
  const auto rows = [&] {
    for (int d = 0; d < grid.row_dims; ++d) s.append(grid.row_size[d], operand.row[d]);
  };
  const auto cols = [&] {
    for (int d = 0; d < grid.col_dims; ++d) s.append(grid.col_size[d], operand.col[d]);
  };
  if (axis == Axis::rows || axis == Axis::rows_cols) rows();
  if (axis != Axis::none && axis != Axis::rows) cols();
  if (axis == Axis::cols_rows) rows();
  return s;
}

// An operand as the drivers see it: for each step a line of lanes, of which any stretch can be had as contiguous numbers
// of the arithmetic type T.
template <class T>
class Stream {
 public:
  Stream() = default;
  UNIGEN_NOINLINE Stream(const Grid& grid, const Array& array, Axis steps, Axis lanes)
      : data_(static_cast<char*>(array.operand.data)),
        dtype_(array.dtype),
        fill_(T(array.fill)),
        steps_(strided(grid, array.operand, steps)),
        lanes_(strided(grid, array.operand, lanes)) {
    item_ = dtype_ == DType::float64 ? 8 : dtype_ == DType::float32 ? 4 : 2;
    const bool stored_as_read = data_ && item_ == int(sizeof(T));
    direct_ = stored_as_read && (lanes_.dims == 0 || (lanes_.dims == 1 && lanes_.stride[0] == 1));
    if (stored_as_read && lanes_.dims > 1 && lanes_.stride[lanes_.dims - 1] == 1) run_ = lanes_.size[lanes_.dims - 1];
  }

  // the step's first lane, in elements from the operand's first
  UNIGEN_INLINE int64_t origin(int64_t step) const { return steps_.offset(step); }

  // lanes [first, first + n); `buffer` has room for them
  UNIGEN_INLINE const T* read(int64_t origin, int64_t first, int64_t n, T* buffer) const {
    if (direct_) return reinterpret_cast<const T*>(data_) + origin + first;
    if (in_one_run(first, n)) return reinterpret_cast<const T*>(data_) + origin + lanes_.offset(first);
    stage(origin, first, n, buffer);
    return buffer;
  }

  // where to put lanes [first, first + n): then call `written` with it
  UNIGEN_INLINE T* target(int64_t origin, int64_t first, int64_t n, T* buffer) const {
    if (direct_) return reinterpret_cast<T*>(data_) + origin + first;
    return in_one_run(first, n) ? reinterpret_cast<T*>(data_) + origin + lanes_.offset(first) : buffer;
  }
  UNIGEN_INLINE void written(int64_t origin, int64_t first, int64_t n, const T* source) const {
    if (!direct_ && !in_one_run(first, n)) unstage(origin, first, n, source);
  }

  // whether any stretch of lanes can be had without a buffer
  bool direct() const { return direct_; }

  UNIGEN_NOINLINE void write(int64_t origin, int64_t first, int64_t n, const T* source) const {
    if (!direct_) return unstage(origin, first, n, source);
    T* target = reinterpret_cast<T*>(data_) + origin + first;
    for (int64_t i = 0; i < n; ++i) target[i] = source[i];
  }

  // the single number at a step, of an operand that does not depend on the lane
  UNIGEN_INLINE T value(int64_t step) const {
    return data_ ? *(reinterpret_cast<const T*>(data_) + steps_.offset(step)) : fill_;
  }

 private:
  UNIGEN_INLINE bool in_one_run(int64_t first, int64_t n) const { return run_ && first % run_ + n <= run_; }

  // body(pointer as if to T's storage type, stride, n, position in the buffer) for each run along the innermost dimension
  template <class S, class Body>
  UNIGEN_INLINE void runs(int64_t origin, int64_t first, int64_t n, const Body& body) const {
    S* data = reinterpret_cast<S*>(data_) + origin;
    if (lanes_.dims <= 1) {
      const int64_t stride = lanes_.dims ? lanes_.stride[0] : 1;
      return body(data + first * stride, stride, n, int64_t(0));
    }
    const int inner = lanes_.dims - 1;
    int64_t index[kAxisDims], rest = first;
    for (int d = inner; d >= 0; --d) {
      index[d] = d ? rest % lanes_.size[d] : rest;
      rest /= lanes_.size[d];
      data += index[d] * lanes_.stride[d];
    }
    for (int64_t done = 0;;) {
      const int64_t run = smaller(n - done, lanes_.size[inner] - index[inner]);
      body(data, lanes_.stride[inner], run, done);
      done += run;
      if (done == n) return;
      data -= index[inner] * lanes_.stride[inner];
      index[inner] = 0;
      for (int d = inner - 1; d >= 0; --d) {
        data += lanes_.stride[d];
        if (++index[d] < lanes_.size[d] || d == 0) break;
        data -= lanes_.size[d] * lanes_.stride[d];
        index[d] = 0;
      }
    }
  }

  template <class S>
  void stage_as(int64_t origin, int64_t first, int64_t n, T* buffer) const {
    runs<S>(origin, first, n,
            [&](const S* source, int64_t stride, int64_t run, int64_t at) { gather(source, stride, run, buffer + at); });
  }
  template <class S>
  void unstage_as(int64_t origin, int64_t first, int64_t n, const T* buffer) const {
    runs<S>(origin, first, n,
            [&](S* target, int64_t stride, int64_t run, int64_t at) { scatter(buffer + at, target, stride, run); });
  }

  UNIGEN_NOINLINE void stage(int64_t origin, int64_t first, int64_t n, T* buffer) const {
    if (!data_) return gather(&fill_, 0, n, buffer);
    if (item_ == int(sizeof(T))) return stage_as<T>(origin, first, n, buffer);
    if constexpr (sizeof(T) == 4) {
      if (dtype_ == DType::bfloat16) return stage_as<BFloat16>(origin, first, n, buffer);
      stage_as<Float16>(origin, first, n, buffer);
    }
  }
  UNIGEN_NOINLINE void unstage(int64_t origin, int64_t first, int64_t n, const T* buffer) const {
    if (!data_) return;  // an output nobody wants
    if (item_ == int(sizeof(T))) return unstage_as<T>(origin, first, n, buffer);
    if constexpr (sizeof(T) == 4) {
      if (dtype_ == DType::bfloat16) return unstage_as<BFloat16>(origin, first, n, buffer);
      unstage_as<Float16>(origin, first, n, buffer);
    }
  }

  char* data_ = nullptr;
  DType dtype_ = DType::float32;
  int item_ = 4;
  bool direct_ = false;
  int64_t run_ = 0;  // lanes that lie beside each other, where not all of them do
  T fill_ = 0;
  Strided steps_, lanes_;
};

// ---- work ----------------------------------------------------------------------------------------------------------

// Units of work: blocks of rows, or pieces of a row where rows are few and long. By shape alone.
struct Partition {
  int64_t rows, cols, block_rows, piece_cols, pieces, count;

  Partition(int64_t rows, int64_t cols, bool split, int64_t row_multiple = 1, int64_t col_multiple = 1,
            int64_t least = kUnit)
      : rows(rows), cols(cols), block_rows(1), piece_cols(cols), pieces(1), count(0) {
    if (rows == 0 || cols == 0) return;
    const int64_t unit = larger(least, ceil_div(rows * cols, kMaxUnits));
    if (split && rows < kFewRows && cols > unit) {
      piece_cols = round_up(round_up(unit, kChunk<float>), col_multiple);
      pieces = ceil_div(cols, piece_cols);
    } else {
      block_rows = smaller(rows, round_up(ceil_div(unit, cols), row_multiple));
    }
    count = ceil_div(rows, block_rows) * pieces;
  }

  UNIGEN_INLINE int64_t row_begin(int64_t unit) const { return unit / pieces * block_rows; }
  UNIGEN_INLINE int64_t row_end(int64_t unit) const { return smaller(rows, row_begin(unit) + block_rows); }
  UNIGEN_INLINE int64_t col_begin(int64_t unit) const { return unit % pieces * piece_cols; }
  UNIGEN_INLINE int64_t col_end(int64_t unit) const { return smaller(cols, col_begin(unit) + piece_cols); }

  // work(unit) for every unit, on as many threads as pay
  template <class Work>
  void run(const Parallel& parallel, const Work& work) const {
    each(parallel, count, work);
  }

  template <class Work>
  static void each(const Parallel& parallel, int64_t count, const Work& work) {
    const auto range = [](int64_t begin, int64_t end, void* context) {
      for (int64_t unit = begin; unit < end; ++unit) (*static_cast<const Work*>(context))(unit);
    };
    void* context = const_cast<void*>(static_cast<const void*>(&work));
    if (count <= 2) return range(0, count, context);
    parallel.run(0, count, 2, range, context);
  }
};

// What blocks of rows are multiples of where lanes run along them: long stretches of memory, if rows are many.
template <class T>
UNIGEN_INLINE int64_t lane_block(int64_t rows) {
  return smaller(256, round_up(ceil_div(larger(rows, 1), 16), Vec<T>::size));
}

// The same, and as many as lie beside each other where that is a chunk.
template <class T>
UNIGEN_INLINE int64_t lane_block(const Grid& grid) {
  const int64_t run = grid.row_dims > 1 ? grid.row_size[grid.row_dims - 1] : 0;
  return 8 * Vec<T>::size <= run && run <= kChunk<T> ? run : lane_block<T>(grid.rows);
}

// how many rows to finish at a time, of blocks of `block`: what was read for them should still be in the cache
template <class T>
UNIGEN_INLINE int64_t batch_rows(int64_t cols, int64_t block) {
  return smaller(kChunk<T>, larger(block, kBatch / larger(cols, 1))) / block * block;
}

UNIGEN_INLINE int64_t inner_stride(const int64_t* size, const int64_t* stride, int dims) {
  for (int d = dims - 1; d >= 0; --d) {
    if (size[d] != 1) return stride[d];
  }
  return 1;
}

// whether rows are contiguous, and columns not
UNIGEN_INLINE bool rows_innermost(const Grid& grid, const Operand& operand) {
  return inner_stride(grid.col_size, operand.col, grid.col_dims) != 1 &&
         inner_stride(grid.row_size, operand.row, grid.row_dims) == 1;
}

// Whether to reduce with lanes along the rows. Rows of a few columns would leave most lanes, and the sum over lanes, idle.
template <class T>
UNIGEN_INLINE bool lanes_along_rows(const Grid& grid, const Operand& operand) {
  return grid.rows >= Vec<T>::size && (rows_innermost(grid, operand) || grid.cols <= Vec<T>::size);
}

// Always the same order of additions for n values: results that are to agree bit for bit go through here.
template <class T>
struct Chains {
  static constexpr int kWays = 4;
  Vec<T> sum[kWays];

  UNIGEN_INLINE Chains() {
    for (int way = 0; way < kWays; ++way) sum[way] = Vec<T>(T(0));
  }
  UNIGEN_INLINE double total() const { return lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3])); }
};
template <class T>
UNIGEN_INLINE double sum_values(const T* values, int n) {
  Chains<T> chains;
  for_vectors_in_turn<T, Chains<T>::kWays>(n, [&](int i, auto l, int way) UNIGEN_FORCED {
    chains.sum[way] = chains.sum[way] + load(values + i, l);
  });
  return chains.total();
}

// the result of a reduction from the units' sums, if there is one
template <class T>
void close_reduction(const Operand& value, const Reduction& reduction, const double* partial, int64_t units) {
  if (!reduction.reduce) return;
  double sum = 0;
  for (int64_t unit = 0; unit < units; ++unit) sum += partial[unit];
  *static_cast<T*>(value.data) = T(sum * reduction.scale / reduction.denominator);
}

// Where the values of rows go: to `value` one by one, or as one number to its first place.
template <class T>
class RowResults {
 public:
  RowResults(const Grid& grid, const Array& value, const Reduction& reduction, int64_t units)
      : reduction_(reduction), result_(value.operand), units_(units) {
    if (!reduction.reduce) value_ = Stream<T>(grid, value, Axis::none, Axis::rows);
    for (int64_t unit = 0; unit < units; ++unit) partial_[unit] = 0;
  }

  // values of rows [row, row + n), found in this unit
  UNIGEN_NOINLINE void take(int64_t unit, int64_t row, int n, T* values) {
    if (reduction_.reduce) {
      partial_[unit] += sum_values(values, n);
    } else {
      if (reduction_.scale != 1) {
        for (int i = 0; i < n; ++i) values[i] *= T(reduction_.scale);
      }
      value_.write(0, row, n, values);
    }
  }

  void take_totals(int64_t unit, int64_t row, int n, const double* totals) {
    alignas(kVectorBytes) T values[kChunk<T>];
    for (int i = 0; i < n; ++i) values[i] = T(totals[i]);
    take(unit, row, n, values);
  }

  void close() const { close_reduction<T>(result_, reduction_, partial_, units_); }

 private:
  Reduction reduction_;
  Stream<T> value_;
  Operand result_;
  int64_t units_;
  double partial_[kMaxUnits + kFewRows];
};

// The same for sums that have a floor, and weights; `rows`, where there is one, keeps the sums themselves.
template <class T>
class FlooredResults {
 public:
  template <class Arguments>
  FlooredResults(const Arguments& a, int64_t units)
      : results_(a.grid, arithmetic(a.value, a), a.reduction, units),
        rows_(a.grid, arithmetic(a.rows, a), Axis::none, Axis::rows),
        weights_(a.grid, arithmetic(a.weights, a), Axis::none, Axis::rows),
        keeps_rows_(a.rows.data),
        weighted_(a.weights.data),
        floor_(a.row_floor) {}

  void take_totals(int64_t unit, int64_t row, int n, const double* totals) {
    alignas(kVectorBytes) T values[kChunk<T>], room[kChunk<T>];
    for (int i = 0; i < n; ++i) values[i] = T(totals[i]);
    if (keeps_rows_) rows_.write(0, row, n, values);
    if (floor_ > -HUGE_VAL) {
      for (int i = 0; i < n; ++i) values[i] = values[i] < T(floor_) ? T(floor_) : values[i];
    }
    if (weighted_) {
      const T* weight = weights_.read(0, row, n, room);
      for (int i = 0; i < n; ++i) values[i] = weight[i] == 0 ? T(0) : values[i] * weight[i];
    }
    results_.take(unit, row, n, values);
  }

  void close() const { results_.close(); }

 private:
  RowResults<T> results_;
  Stream<T> rows_, weights_;
  bool keeps_rows_, weighted_;
  double floor_;
};

// ---- map: elements to elements -------------------------------------------------------------------------------------

// For each element: out[0 … kOut) = f(row, in[0 … kIn)). The kRow row operands are of the arithmetic type; once per row,
// f.prepare(operands, row) turns them into the F::kKept numbers that the elements need. The first kFactors of the operands
// are factors of all that a row gives: where one of them is 0 so is the latter, whatever the elements are.
template <class T, int kRow, int kIn, int kOut, int kFactors = 0>
class Map {
  using V = Vec<T>;

 public:
  // lanes and layout follow the first input
  Map(const Grid& grid, const Array* row, const Array* in, const Array* out) : rows_(grid.rows), cols_(grid.cols) {
    const bool rows_inner = rows_innermost(grid, in[0].operand);
    if (kRow == 0) {
      lanes_ = rows_inner ? Axis::cols_rows : Axis::rows_cols;
    } else if (rows_inner || grid.cols == 1) {
      lanes_ = Axis::rows;
    } else {
      lanes_ = grid.cols < 2 * V::size ? Axis::rows_cols : Axis::cols;
    }
    block_ = lanes_ == Axis::rows ? lane_block<T>(grid) : 1;
    const Axis steps = lanes_ == Axis::rows ? Axis::cols : lanes_ == Axis::cols ? Axis::rows : Axis::none;
    for (int k = 0; k < kRow; ++k) {
      row_[k] = lanes_ == Axis::cols ? Stream<T>(grid, row[k], Axis::rows, Axis::none)
                                     : Stream<T>(grid, row[k], Axis::none, Axis::rows);
    }
    for (int k = 0; k < kIn; ++k) in_[k] = Stream<T>(grid, in[k], steps, lanes_);
    int64_t bytes = 0;
    for (int k = 0; k < kOut; ++k) {
      out_[k] = Stream<T>(grid, out[k], steps, lanes_);
      if (out[k].operand.data) bytes += rows_ * cols_ * int64_t(sizeof(T));
    }
    streams_ = bytes >= kStreamedBytes;
  }

  template <class F>
  void run(const Parallel& parallel, const F& f) const {
    if constexpr (kRow == 0) {
      const Partition partition(rows_ * cols_, 1, false, kChunk<T>);
      partition.run(parallel, [&](int64_t u) { flat(f, partition.row_begin(u), partition.row_end(u)); });
    } else {
      const bool split = lanes_ == Axis::cols;
      const Partition partition(rows_, cols_, split, block_);
      partition.run(parallel, [&](int64_t u) {
        region(f, partition.row_begin(u), partition.row_end(u), partition.col_begin(u), partition.col_end(u));
      });
    }
  }

  // rows [begin, end), on this thread
  template <class F>
  void region(const F& f, int64_t begin, int64_t end) const {
    region(f, begin, end, 0, cols_);
  }

  // elements [begin, end) of a grid without row operands, on this thread
  template <class F>
  void span(const F& f, int64_t begin, int64_t end) const {
    flat(f, begin, end);
  }

 private:
  static constexpr int kRowRoom = kRow ? kRow : 1;
  template <class F>
  static constexpr int kKeptRoom = F::kKept ? F::kKept : 1;

  template <class F>
  void region(const F& f, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) const {
    if (lanes_ == Axis::rows) {
      along_rows(f, row_begin, row_end);
    } else if (lanes_ == Axis::cols) {
      along_cols(f, row_begin, row_end, col_begin, col_end);
    } else {
      across_rows(f, row_begin, row_end);
    }
    if (streams_) end_streams();
  }

  template <class F>
  UNIGEN_NOINLINE void flat(F f, int64_t begin, int64_t end) const {
    alignas(kVectorBytes) T room[kIn + kOut][kChunk<T>];
    const int64_t origin[kIn + kOut] = {};
    for (int64_t first = begin; first < end; first += kChunk<T>) {
      elements(f, origin, first, int(smaller(kChunk<T>, end - first)), room, nullptr, [](int, V*) UNIGEN_FORCED {});
    }
    if (streams_) end_streams();
  }

  // lanes are columns of one row: what is kept of the row operands is constant
  template <class F>
  UNIGEN_NOINLINE void along_cols(F f, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) const {
    alignas(kVectorBytes) T room[kIn + kOut][kChunk<T>];
    for (int64_t r = row_begin; r < row_end; ++r) {
      V operands[kRowRoom], row[F::kKept];
      bool counts = true;
      for (int k = 0; k < kRow; ++k) {
        const T x = row_[k].value(r);
        if (k < kFactors) counts = counts && x != 0;
        operands[k] = V(x);
      }
      int64_t origin[kIn + kOut];
      set_origins(r, origin);
      if (!counts) {
        write_zeros(origin, col_begin, col_end);
        continue;
      }
      f.prepare(operands, row);
      for (int64_t c = col_begin; c < col_end; c += kChunk<T>) {
        elements(f, origin, c, int(smaller(kChunk<T>, col_end - c)), room, nullptr, [&](int, V* target) UNIGEN_FORCED {
          for (int k = 0; k < F::kKept; ++k) target[k] = row[k];
        });
      }
    }
  }

  // lanes are rows, column by column
  template <class F>
  UNIGEN_NOINLINE void along_rows(F f, int64_t begin, int64_t end) const {
    alignas(kVectorBytes) T room[kIn + kOut][kChunk<T>], row[F::kKept][kChunk<T>], counts[kChunk<T>];
    const int64_t most = kChunk<T> / block_ * block_;
    for (int64_t first = begin; first < end; first += most) {
      const int n = int(smaller(most, end - first));
      const T* const counted = prepare(f, first, n, row, counts) ? nullptr : counts;
      for (int64_t c = 0; c < cols_; ++c) {
        int64_t origin[kIn + kOut];
        set_origins(c, origin);
        elements(f, origin, first, n, room, counted, [&](int i, V* target) UNIGEN_FORCED {
          for (int k = 0; k < F::kKept; ++k) target[k] = load(row[k] + i);
        });
      }
    }
  }

  // lanes run on from one short row to the next
  template <class F>
  UNIGEN_NOINLINE void across_rows(F f, int64_t begin, int64_t end) const {
    constexpr int kSlack = 2 * V::size;
    alignas(kVectorBytes) T room[kIn + kOut][kChunk<T>], row[F::kKept][kChunk<T>], spread[F::kKept][kChunk<T> + kSlack];
    alignas(kVectorBytes) T counts[kChunk<T>], spread_counts[kChunk<T> + kSlack];
    const int64_t origin[kIn + kOut] = {};
    const int cols = int(cols_), most = kChunk<T> / cols;
    for (int64_t first = begin; first < end; first += most) {
      const int n = int(smaller(most, end - first));
      const auto spread_rows = [&](const T* numbers, T* target) {
        // whole vectors: what they write beyond a row, the next one overwrites
        for (int r = 0; r < n; ++r) {
          const V x(numbers[r]);
          for (int c = 0; c < cols; c += V::size) store(target + r * cols + c, x);
        }
      };
      const bool all = prepare(f, first, n, row, counts);
      for (int k = 0; k < F::kKept; ++k) spread_rows(row[k], spread[k]);
      if (!all) spread_rows(counts, spread_counts);
      elements(f, origin, first * cols_, n * cols, room, all ? nullptr : spread_counts, [&](int i, V* target) UNIGEN_FORCED {
        for (int k = 0; k < F::kKept; ++k) target[k] = load(spread[k] + i);
      });
    }
  }

  UNIGEN_INLINE void set_origins(int64_t step, int64_t* origin) const {
    for (int k = 0; k < kIn; ++k) origin[k] = in_[k].origin(step);
    for (int k = 0; k < kOut; ++k) origin[kIn + k] = out_[k].origin(step);
  }

  // What is kept of rows [first, first + n); returns whether all of them count, and if not, the others have a 0 in `counts`.
  template <class F>
  UNIGEN_INLINE bool prepare(const F& f, int64_t first, int n, T (*row)[kChunk<T>], T* counts) const {
    alignas(kVectorBytes) T room[kRowRoom][kChunk<T>];
    const T* source[kRowRoom];
    const V zero(T(0)), one(T(1));
    V all = one;
    for (int k = 0; k < kRow; ++k) source[k] = row_[k].read(0, first, n, room[k]);
    for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
      V operands[kRowRoom], kept[F::kKept];
      for (int k = 0; k < kRow; ++k) operands[k] = load(source[k] + i, l);
      f.prepare(operands, kept);
      for (int k = 0; k < F::kKept; ++k) store(row[k] + i, kept[k]);
      if constexpr (kFactors > 0) {
        V own = one;
        for (int k = 0; k < kFactors; ++k) own = select(operands[k] == zero, zero, own);
        store(counts + i, own);
        all = keep(l, own * all, all);
      }
    });
    return !any(all == zero);
  }

  UNIGEN_NOINLINE void write_zeros(const int64_t* origin, int64_t begin, int64_t end) const {
    alignas(kVectorBytes) static constexpr T zeros[kChunk<T>] = {};
    for (int k = 0; k < kOut; ++k)
      for (int64_t c = begin; c < end; c += kChunk<T>) out_[k].write(origin[kIn + k], c, smaller(kChunk<T>, end - c), zeros);
  }

  static UNIGEN_NOINLINE void set_zeros(const T* counts, int n, T* target) {
    for (int i = 0; i < n; ++i) target[i] = counts[i] == 0 ? T(0) : target[i];
  }

  // set_row(i, row): what is kept of the rows of elements i, i + 1, … `counts`: 0 for elements whose results are 0, or null
  template <class F, class SetRow>
  UNIGEN_INLINE void elements(const F& f, const int64_t* origin, int64_t first, int n, T (*room)[kChunk<T>],
                              const T* counts, const SetRow& set_row) const {
    const T* source[kIn];
    T* target[kOut];
    for (int k = 0; k < kIn; ++k) source[k] = in_[k].read(origin[k], first, n, room[k]);
    bool streamed[kOut];
    for (int k = 0; k < kOut; ++k) {
      target[k] = out_[k].target(origin[kIn + k], first, n, room[kIn + k]);
      streamed[k] = streams_ && !counts && target[k] != room[kIn + k] && reinterpret_cast<uintptr_t>(target[k]) % kVectorBytes == 0;
    }
    for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
      V row[kKeptRoom<F>], x[kIn], y[kOut];
      set_row(i, row);
      for (int k = 0; k < kIn; ++k) {
        x[k] = load(source[k] + i, l);
        __builtin_prefetch(source[k] + i + kElementsAhead);
      }
      f(row, x, y);
      for (int k = 0; k < kOut; ++k) {
        if (streamed[k]) {
          stream(target[k] + i, y[k], l);
        } else {
          store(target[k] + i, y[k], l);
          __builtin_prefetch(target[k] + i + kElementsAhead, 1);
        }
      }
    });
    for (int k = 0; k < kOut; ++k) {
      if (counts) set_zeros(counts, n, target[k]);
      out_[k].written(origin[kIn + k], first, n, target[k]);
    }
  }

  int64_t rows_, cols_, block_;
  bool streams_;
  Axis lanes_;
  Stream<T> row_[kRowRoom], in_[kIn], out_[kOut];
};

// ---- sums over each row --------------------------------------------------------------------------------------------

// finish(0, row, n, totals) for rows without columns
template <class Finish>
void finish_empty_rows(const Partition& partition, const Finish& finish) {
  const double totals[kFewRows] = {};
  for (int64_t r = 0; r < partition.rows; r += kFewRows)
    finish(0, r, int(smaller(kFewRows, partition.rows - r)), totals);
}

// the same for rows that were split, given the sums of their pieces
template <class Finish>
void finish_pieces(const Partition& partition, const double* partial, const Finish& finish) {
  double totals[kFewRows];
  for (int64_t r = 0; r < partition.rows; ++r) {
    totals[r] = 0;
    for (int64_t p = 0; p < partition.pieces; ++p) totals[r] += partial[r * partition.pieces + p];
  }
  finish(0, 0, int(partition.rows), totals);
}

// Sums over the columns. The function object has
//   static constexpr int kStates; add(V* state, const V* in): one more element; close(const V* state): the sum so far.
// States start at 0, and hold at most kFlush elements. finish(unit, row, n, totals) gets the sums of rows [row, row + n).
template <class T, int kIn, class F>
class RowSum {
  using V = Vec<T>;
  static constexpr int kStates = F::kStates;

 public:
  RowSum(const Grid& grid, const Array* in, const F& f)
      : f_(f),
        lanes_are_rows_(lanes_along_rows<T>(grid, in[0].operand)),
        block_(lanes_are_rows_ ? lane_block<T>(grid) : 1),
        partition_(grid.rows, grid.cols, !lanes_are_rows_, block_) {
    const Axis steps = lanes_are_rows_ ? Axis::cols : Axis::rows, lanes = lanes_are_rows_ ? Axis::rows : Axis::cols;
    for (int k = 0; k < kIn; ++k) in_[k] = Stream<T>(grid, in[k], steps, lanes);
  }

  int64_t units() const { return larger(1, partition_.count); }
  bool split() const { return partition_.pieces > 1; }  // then finish is called once, after all threads are done

  template <class Finish>
  void run(const Parallel& parallel, const Finish& finish) const {
    if (partition_.cols == 0) return finish_empty_rows(partition_, finish);
    if (split()) {
      double partial[kMaxUnits + kFewRows];
      partition_.run(parallel, [&](int64_t u) {
        partial[u] = row_piece(partition_.row_begin(u), partition_.col_begin(u), partition_.col_end(u));
      });
      return finish_pieces(partition_, partial, finish);
    }
    partition_.run(parallel, [&](int64_t u) {
      alignas(kVectorBytes) double totals[kChunk<T>];
      const int64_t end = partition_.row_end(u), batch = batch_rows<T>(partition_.cols, block_);
      for (int64_t r = partition_.row_begin(u); r < end; r += batch) {
        const int n = int(smaller(batch, end - r));
        if (lanes_are_rows_) {
          lane_rows(r, n, totals);
        } else {
          for (int i = 0; i < n; ++i) totals[i] = row_piece(r + i, 0, partition_.cols);
        }
        finish(u, r, n, totals);
      }
    });
  }

 private:
  UNIGEN_NOINLINE double row_piece(int64_t row, int64_t col_begin, int64_t col_end) const {
    const F f = f_;
    alignas(kVectorBytes) T room[kIn][kChunk<T>];
    int64_t origin[kIn];
    for (int k = 0; k < kIn; ++k) origin[k] = in_[k].origin(row);
    constexpr int chunk = int(kChunk<T> < kFlush * V::size ? kChunk<T> : kFlush * V::size);
    double total = 0;
    for (int64_t c = col_begin; c < col_end; c += chunk) {
      const int n = int(smaller(chunk, col_end - c));
      const T* source[kIn];
      for (int k = 0; k < kIn; ++k) source[k] = in_[k].read(origin[k], c, n, room[k]);
      V state[kStates];
      for (int s = 0; s < kStates; ++s) state[s] = V(T(0));
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        V x[kIn], next[kStates];
        for (int k = 0; k < kIn; ++k) {
          x[k] = load(source[k] + i, l);
          __builtin_prefetch(source[k] + i + kElementsAhead);
        }
        for (int s = 0; s < kStates; ++s) next[s] = state[s];
        f.add(next, x);
        for (int s = 0; s < kStates; ++s) state[s] = keep(l, next[s], state[s]);
      });
      total += lane_sum(f.close(state));
    }
    return total;
  }

  UNIGEN_NOINLINE void lane_rows(int64_t row, int n, double* totals) const {
    const F f = f_;
    alignas(kVectorBytes) T room[kIn][kChunk<T>];
    alignas(kVectorBytes) T state[kStates][kChunk<T>];
    const int padded = int(round_up(n, V::size));
    for (int i = 0; i < padded; ++i) totals[i] = 0;
    for (int64_t block = 0; block < partition_.cols; block += kFlush) {
      for (int s = 0; s < kStates; ++s) {
        for (int i = 0; i < padded; ++i) state[s][i] = 0;
      }
      const int64_t block_end = smaller(partition_.cols, block + kFlush);
      for (int64_t c = block; c < block_end; ++c) {
        const T* source[kIn];
        for (int k = 0; k < kIn; ++k) source[k] = in_[k].read(in_[k].origin(c), row, n, room[k]);
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          V x[kIn], next[kStates];
          for (int k = 0; k < kIn; ++k) x[k] = load(source[k] + i, l);
          for (int s = 0; s < kStates; ++s) next[s] = load(state[s] + i);
          f.add(next, x);
          for (int s = 0; s < kStates; ++s) store(state[s] + i, next[s]);
        });
      }
      for (int i = 0; i < padded; i += V::size) {
        V last[kStates];
        for (int s = 0; s < kStates; ++s) last[s] = load(state[s] + i);
        add_lanes(totals + i, f.close(last));
      }
    }
  }

  F f_;
  bool lanes_are_rows_;
  int64_t block_;
  Partition partition_;
  Stream<T> in_[kIn];
};

// A sum over each row, and then a map of that row's elements: out = f(total, in), f being RowSum's function object as well.
// The function object's prepare(total, row) keeps of the total what the elements need, as in Map. Input F::kFactor is a factor
// of both: where it is 0 throughout a row, so are the row's results, even if the other inputs are not numbers.
template <class T, int kIn, class F>
class RowSumMap {
  using V = Vec<T>;
  static constexpr int kStates = F::kStates;

 public:
  RowSumMap(const Grid& grid, const Array* in, const Array& out, const F& f)
      : grid_(grid), array_out_(out), f_(f), sum_(grid, in, f), out_(grid, out, Axis::rows, Axis::cols) {
    for (int k = 0; k < kIn; ++k) {
      array_in_[k] = in[k];
      in_[k] = Stream<T>(grid, in[k], Axis::rows, Axis::cols);
    }
  }

  void run(const Parallel& parallel) const {
    if (grid_.cols > 0 && grid_.cols <= kChunk<T> && !lanes_along_rows<T>(grid_, array_in_[0].operand)) {
      const Partition partition(grid_.rows, grid_.cols, false);
      return partition.run(parallel, [&](int64_t u) { short_rows(partition.row_begin(u), partition.row_end(u)); });
    }
    const bool split = sum_.split();
    sum_.run(parallel, [&](int64_t, int64_t first, int n, const double* totals) {
      alignas(kVectorBytes) T total[kChunk<T>];
      for (int i = 0; i < n; ++i) total[i] = T(totals[i]);
      const Array row = rows_from<T>(total, first, grid_);
      const Map<T, 1, kIn, 1> map(grid_, &row, array_in_, &array_out_);
      if (split) {
        map.run(parallel, f_);
      } else {
        map.region(f_, first, first + n);
      }
      for (int i = 0; i < n; ++i)
        if (total[i] != total[i]) zero_row(first + i);
    });
  }

 private:
  // whether the factor of a row is 0 throughout; then the results are written
  UNIGEN_NOINLINE bool zero_row(int64_t row) const {
    alignas(kVectorBytes) T room[kChunk<T>];
    const Stream<T>& factor = in_[F::kFactor];
    const auto chunks = [&](const auto& body) {
      for (int64_t c = 0; c < grid_.cols; c += kChunk<T>) body(c, int(smaller(kChunk<T>, grid_.cols - c)));
    };
    bool zero = true;
    chunks([&](int64_t c, int n) {
      const T* source = factor.read(factor.origin(row), c, n, room);
      for (int i = 0; i < n; ++i) zero = zero && source[i] == 0;
    });
    for (T& x : room) x = 0;
    if (zero) chunks([&](int64_t c, int n) { out_.write(out_.origin(row), c, n, room); });
    return zero;
  }

  // rows of one chunk: what the sum has read, the map finds in the nearest cache
  UNIGEN_NOINLINE void short_rows(int64_t begin, int64_t end) const {
    const F f = f_;
    alignas(kVectorBytes) T room[kIn + 1][kChunk<T>];
    const int cols = int(grid_.cols);
    for (int64_t r = begin; r < end; ++r) {
      const T* source[kIn];
      for (int k = 0; k < kIn; ++k) source[k] = in_[k].read(in_[k].origin(r), 0, cols, room[k]);
      V state[kStates], row[F::kKept];
      for (int s = 0; s < kStates; ++s) state[s] = V(T(0));
      for_vectors<T>(cols, [&](int i, auto l) UNIGEN_FORCED {
        V x[kIn], next[kStates];
        for (int k = 0; k < kIn; ++k) x[k] = load(source[k] + i, l);
        for (int s = 0; s < kStates; ++s) next[s] = state[s];
        f.add(next, x);
        for (int s = 0; s < kStates; ++s) state[s] = keep(l, next[s], state[s]);
        for (int k = 0; k < kIn; ++k) __builtin_prefetch(source[k] + kRowsAhead * cols + i);
      });
      const V total = V(T(lane_sum(f.close(state))));
      if (__builtin_expect(total.v[0] != total.v[0], false) && zero_row(r)) continue;
      f.prepare(&total, row);
      const int64_t origin = out_.origin(r);
      T* target = out_.target(origin, 0, cols, room[kIn]);
      for_vectors<T>(cols, [&](int i, auto l) UNIGEN_FORCED {
        V x[kIn], y;
        for (int k = 0; k < kIn; ++k) x[k] = load(source[k] + i, l);
        f(row, x, &y);
        store(target + i, y, l);
        __builtin_prefetch(target + kRowsAhead * cols + i, 1);
      });
      out_.written(origin, 0, cols, target);
    }
  }

  Grid grid_;
  Array array_in_[kIn], array_out_;
  F f_;
  RowSum<T, kIn, F> sum_;
  Stream<T> in_[kIn], out_;
};

// ---- exponentials over each row ------------------------------------------------------------------------------------

// Of x = log_w / temperature in each row: its shift (the maximum, made finite), the sum of e = exp(x - shift), and the sum
// of an extra: what f.extra(log_w, e) says, which scales as e does or as its square (F::kSquares). NaN and +inf end up in
// the sum. finish(unit, row, n, shift, sum, extra). With F::kNormalize, where `normalizes()`, what is done instead is that each
// e over its row's sum is written to `weights`.
struct NoExtra {
  static constexpr bool kExtra = false, kSquares = false, kNormalize = false;
  template <class V>
  UNIGEN_INLINE V extra(V, V e) const {
    return e;
  }
};

template <class T, class F>
class RowExponentials {
  using V = Vec<T>;
  static constexpr int kBlockCols = 16;

 public:
  RowExponentials(const Grid& grid, const Array& log_w, double temperature, const F& f = {}, const Array& weights = {})
      : f_(f),
        scaled_(temperature != 1),
        temperature_(T(temperature)),
        lanes_are_rows_(lanes_along_rows<T>(grid, log_w.operand)),
        block_(lanes_are_rows_ ? lane_block<T>(grid.rows) : 1),
        partition_(grid.rows, grid.cols, !lanes_are_rows_, block_),
        log_w_(grid, log_w, lanes_are_rows_ ? Axis::cols : Axis::rows, lanes_are_rows_ ? Axis::rows : Axis::cols) {
    if constexpr (F::kNormalize) weights_ = Stream<T>(grid, weights, Axis::rows, Axis::cols);
  }

  int64_t units() const { return larger(1, partition_.count); }
  bool split() const { return partition_.pieces > 1; }  // then finish is called once, after all threads are done
  // rows that stay in the nearest cache
  bool normalizes() const {
    return F::kNormalize && !lanes_are_rows_ && partition_.cols <= kChunk<T> && weights_.direct();
  }

  template <class Finish>
  void run(const Parallel& parallel, const Finish& finish) const {
    if (split()) {
      Row partial[kMaxUnits + kFewRows];
      partition_.run(parallel, [&](int64_t u) {
        const int64_t row = partition_.row_begin(u), begin = partition_.col_begin(u), end = partition_.col_end(u);
        partial[u] = row_sums(row, begin, end, row_maximum(row, begin, end));
      });
      Batch batch;
      for (int64_t r = 0; r < partition_.rows; ++r) batch.set(int(r), merged(partial + r * partition_.pieces));
      return finish(0, 0, int(partition_.rows), batch.shift, batch.sum, batch.extra);
    }
    partition_.run(parallel, [&](int64_t u) {
      Batch batch;
      const int64_t end = partition_.row_end(u), most = batch_rows<T>(partition_.cols, block_);
      for (int64_t r = partition_.row_begin(u); r < end; r += most) {
        const int n = int(smaller(most, end - r));
        if (F::kNormalize && normalizes()) {
          for (int i = 0; i < n; i += V::size) normalize(r + i, int(smaller(n - i, V::size)));
          continue;
        }
        if (lanes_are_rows_) {
          lane_rows(r, n, batch);
        } else {
          // two loops: rows overlap better in the processor where each is done with sooner
          T maximum[kChunk<T>];
          for (int i = 0; i < n; ++i) maximum[i] = row_maximum(r + i, 0, partition_.cols);
          for (int i = 0; i < n; ++i) batch.set(i, row_sums(r + i, 0, partition_.cols, maximum[i]));
        }
        finish(u, r, n, batch.shift, batch.sum, batch.extra);
      }
    });
  }

 private:
  struct Row {
    T maximum;
    double sum, extra;
  };
  struct Batch {
    alignas(kVectorBytes) T shift[kChunk<T>];
    alignas(kVectorBytes) double sum[kChunk<T>], extra[kChunk<T>];

    UNIGEN_INLINE void set(int i, const Row& row) {
      shift[i] = finite_shift(row.maximum);
      sum[i] = row.sum;
      extra[i] = row.extra;
    }
  };

  UNIGEN_INLINE V over_temperature(V x) const { return scaled_ ? x / V(temperature_) : x; }

  UNIGEN_NOINLINE T row_maximum(int64_t row, int64_t col_begin, int64_t col_end) const {
    alignas(kVectorBytes) T room[kChunk<T>];
    const V lowest = constant<V>(-HUGE_VAL);
    const int64_t origin = log_w_.origin(row);
    V maximum = lowest;
    for (int64_t c = col_begin; c < col_end; c += kChunk<T>) {
      const int n = int(smaller(kChunk<T>, col_end - c));
      const T* source = log_w_.read(origin, c, n, room);
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        maximum = max(keep(l, over_temperature(load(source + i, l)), lowest), maximum);
      });
    }
    return lane_max(maximum);
  }

  UNIGEN_NOINLINE Row row_sums(int64_t row, int64_t col_begin, int64_t col_end, T maximum) const {
    alignas(kVectorBytes) T room[kChunk<T>];
    const int64_t origin = log_w_.origin(row);
    const V shift(finite_shift(maximum));
    Row result = {maximum, 0, 0};
    for (int64_t c = col_begin; c < col_end; c += kChunk<T>) {
      const int n = int(smaller(kChunk<T>, col_end - c));
      const T* source = log_w_.read(origin, c, n, room);
      V sum(T(0)), extra(T(0));
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        const V x = load(source + i, l), e = exp_of_distance(over_temperature(x) - shift);
        sum = keep(l, sum + e, sum);
        extra = keep(l, extra + f_.extra(x, e), extra);
      });
      result.sum += lane_sum(sum);
      if constexpr (F::kExtra) result.extra += lane_sum(extra);
    }
    return result;
  }

  // As many rows as a vector has lanes, or fewer: what is a number of each row is then one vector.
  UNIGEN_NOINLINE void normalize(int64_t row, int rows) const {
    alignas(kVectorBytes) T room[kChunk<T>], shift[V::size], inverse[V::size];
    const int cols = int(partition_.cols);
    const V lowest = constant<V>(-HUGE_VAL);
    V of_row[V::size];
    for (int r = 0; r < V::size; ++r) {
      of_row[r] = lowest;
      if (r >= rows) continue;
      const T* source = log_w_.read(log_w_.origin(row + r), 0, cols, room);
      V maximum = lowest;
      for_vectors<T>(cols, [&](int i, auto l) UNIGEN_FORCED {
        maximum = max(keep(l, over_temperature(load(source + i, l)), lowest), maximum);
        __builtin_prefetch(source + V::size * cols + i);
      });
      of_row[r] = maximum;
    }
    store(shift, finite_shift(over_lanes(of_row, [](V a, V b) { return max(a, b); })));
    for (int r = 0; r < V::size; ++r) {
      of_row[r] = V(T(0));
      if (r >= rows) continue;
      const T* source = log_w_.read(log_w_.origin(row + r), 0, cols, room);
      T* target = weights_.target(weights_.origin(row + r), 0, cols, room);
      const V of_shift(shift[r]);
      V sum(T(0));
      for_vectors<T>(cols, [&](int i, auto l) UNIGEN_FORCED {
        const V e = exp_of_distance(over_temperature(load(source + i, l)) - of_shift);
        sum = keep(l, sum + e, sum);
        store(target + i, e, l);
        __builtin_prefetch(target + kRowsAhead * cols + i, 1);
      });
      of_row[r] = sum;
    }
    store(inverse, inverse_sum(over_lanes(of_row, [](V a, V b) { return a + b; })));
    for (int r = 0; r < rows; ++r) {
      T* target = weights_.target(weights_.origin(row + r), 0, cols, room);
      const V of_inverse(inverse[r]);
      for_vectors<T>(cols, [&](int i, auto l) UNIGEN_FORCED { store(target + i, load(target + i, l) * of_inverse, l); });
    }
  }

  UNIGEN_NOINLINE Row merged(const Row* pieces) const {
    Row row = {-T(HUGE_VAL), 0, 0};
    for (int64_t p = 0; p < partition_.pieces; ++p) {
      if (row.maximum < pieces[p].maximum) row.maximum = pieces[p].maximum;
    }
    for (int64_t p = 0; p < partition_.pieces; ++p) {
      // a piece of -inf adds nothing, but may hold a NaN
      const bool empty = pieces[p].maximum == -T(HUGE_VAL);
      const double factor = empty ? 1 : ::exp(double(pieces[p].maximum) - double(row.maximum));
      row.sum += pieces[p].sum * factor;
      row.extra += pieces[p].extra * (F::kSquares ? factor * factor : factor);
    }
    return row;
  }

  // Block by block of columns, each read once: what was summed is rescaled where the maximum has risen.
  UNIGEN_NOINLINE void lane_rows(int64_t row, int n, Batch& batch) const {
    alignas(kVectorBytes) T room[kBlockCols][kChunk<T>];
    alignas(kVectorBytes) T maximum[kChunk<T>], sum[kChunk<T>], extra[kChunk<T>];
    const V lowest = constant<V>(-HUGE_VAL);
    const int padded = int(round_up(n, V::size));
    for (int i = 0; i < padded; ++i) {
      maximum[i] = -T(HUGE_VAL);
      batch.sum[i] = batch.extra[i] = 0;
    }
    for (int64_t block = 0; block < partition_.cols; block += kBlockCols) {
      const int cols = int(smaller(kBlockCols, partition_.cols - block));
      const T* source[kBlockCols];
      alignas(kVectorBytes) T risen[kChunk<T>];
      for (int i = 0; i < padded; i += V::size) store(risen + i, load(maximum + i));
      for (int c = 0; c < cols; ++c) {
        source[c] = log_w_.read(log_w_.origin(block + c), row, n, room[c]);
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          store(risen + i, max(over_temperature(load(source[c] + i, l)), load(risen + i)));
        });
      }
      for (int i = 0; i < padded; i += V::size) {
        const V before = load(maximum + i), now = load(risen + i);
        store(maximum + i, now);
        store(batch.shift + i, finite_shift(now));
        store(sum + i, V(T(0)));
        store(extra + i, V(T(0)));
        if (block == 0) continue;
        // nothing, or a NaN, was summed where all was -inf
        const V factor = select(before == lowest, constant<V>(1), exp_of_distance(before - now));
        scale_lanes(batch.sum + i, factor);
        if constexpr (F::kExtra) scale_lanes(batch.extra + i, F::kSquares ? factor * factor : factor);
      }
      for (int c = 0; c < cols; ++c) {
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          const V x = load(source[c] + i, l), e = exp_of_distance(over_temperature(x) - load(batch.shift + i));
          store(sum + i, load(sum + i) + e);
          if constexpr (F::kExtra) store(extra + i, load(extra + i) + f_.extra(x, e));
        });
      }
      for (int i = 0; i < padded; i += V::size) {
        add_lanes(batch.sum + i, load(sum + i));
        if constexpr (F::kExtra) add_lanes(batch.extra + i, load(extra + i));
      }
    }
  }

  F f_;
  bool scaled_;
  T temperature_;
  bool lanes_are_rows_;
  int64_t block_;
  Partition partition_;
  Stream<T> log_w_, weights_;
};

// ---- several sweeps over each row ------------------------------------------------------------------------------------

// An estimator (formulas/importance.h) of every row: as many rows as a vector has lanes are done together, so that what is
// a number of each row is one vector. finish(unit, row, n, kept) gets what is kept of rows [row, row + n);
// save(sweep, row, n, planes) what a sweep leaves.
template <class T, class F>
class RowSweeps {
  using V = Vec<T>;
  static constexpr int kRows = V::size, kIn = F::kIn, kSums = F::kSums, kKept = F::kKept;
  static constexpr int kSweepPlanes = F::kSweepPlanes ? F::kSweepPlanes : 1;

 public:
  RowSweeps(const Grid& grid, const Array* in, const F& f)
      : f_(f),
        lanes_are_rows_(lanes_along_rows<T>(grid, in[0].operand)),
        partition_(grid.rows, grid.cols, false, lanes_are_rows_ || grid.cols < kChunk<T> ? kRows : 1) {
    const Axis steps = lanes_are_rows_ ? Axis::cols : Axis::rows, lanes = lanes_are_rows_ ? Axis::rows : Axis::cols;
    for (int k = 0; k < kIn; ++k) in_[k] = Stream<T>(grid, in[k], steps, lanes);
  }

  int64_t units() const { return larger(1, partition_.count); }

  template <class Save, class Finish>
  void run(const Parallel& parallel, const Save& save, const Finish& finish) const {
    partition_.run(parallel, [&](int64_t u) {
      const int64_t end = partition_.row_end(u);
      for (int64_t r = partition_.row_begin(u); r < end; r += kRows) {
        const int n = int(smaller(kRows, end - r));
        V kept[kKept];
        if (lanes_are_rows_) {
          along_rows(r, n, kept, save);
        } else {
          along_cols(r, n, kept, save);
        }
        finish(u, r, n, kept);
      }
    });
  }

 private:
  // a new number among the two largest
  static UNIGEN_INLINE void insert(V x, V& first, V& second) {
    if constexpr (F::kSecond) second = max(min(x, first), second);
    first = max(x, first);
  }

  static UNIGEN_INLINE void lane_extremes(V& first, V& second) {
    typename V::Bits index;
    for (int i = 0; i < V::size; ++i) index[i] = i;
    for (int half = V::size / 2; half; half /= 2) {
      const V other(__builtin_shuffle(first.v, index ^ half));
      if constexpr (F::kSecond) {
        second = max(min(first, other), max(second, V(__builtin_shuffle(second.v, index ^ half))));
      }
      first = max(first, other);
    }
  }

  // body(sources, n, first) for each stretch of a row
  template <class Body>
  UNIGEN_INLINE void stretches(int64_t row, T (*room)[kChunk<T>], const Body& body) const {
    int64_t origin[kIn];
    for (int k = 0; k < kIn; ++k) origin[k] = in_[k].origin(row);
    for (int64_t c = 0; c < partition_.cols; c += kChunk<T>) {
      const int n = int(smaller(kChunk<T>, partition_.cols - c));
      const T* source[kIn];
      for (int k = 0; k < kIn; ++k) source[k] = in_[k].read(origin[k], c, n, room[k]);
      body(source, n);
    }
  }

  template <class Save>
  UNIGEN_NOINLINE void along_cols(int64_t row, int rows, V* kept, const Save& save) const {
    const F f = f_;
    alignas(kVectorBytes) T room[kIn][kChunk<T>], of_rows[kKept][kRows], first[kRows], second[kRows];
    alignas(kVectorBytes) T totals[kSums][kRows];
    const V lowest = constant<V>(-HUGE_VAL);
    for (int r = 0; r < kRows; ++r) {
      first[r] = second[r] = 0;
      for (int s = 0; s < kSums; ++s) totals[s][r] = 1;
    }
    for (int r = 0; r < rows; ++r) {
      V largest = lowest, next = lowest;
      stretches(row + r, room, [&](const T** source, int n) UNIGEN_FORCED {
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          V x[kIn];
          for (int k = 0; k < kIn; ++k) x[k] = load(source[k] + i, l);
          insert(keep(l, f.key(x), lowest), largest, next);
        });
      });
      lane_extremes(largest, next);
      first[r] = largest.v[0];
      second[r] = next.v[0];
    }
    f.open(load(first), load(second), kept);
    const int sweeps = f.sweeps();
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      for (int k = 0; k < kKept; ++k) store(of_rows[k], kept[k]);
      for (int r = 0; r < rows; ++r) {
        V own[kKept];
        for (int k = 0; k < kKept; ++k) own[k] = V(of_rows[k][r]);
        double total[kSums] = {};
        stretches(row + r, room, [&](const T** source, int n) UNIGEN_FORCED {
          V sum[kSums];
          for (int s = 0; s < kSums; ++s) sum[s] = V(T(0));
          for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
            V x[kIn], t[kSums];
            for (int k = 0; k < kIn; ++k) x[k] = load(source[k] + i, l);
            f.terms(sweep, own, x, t);
            for (int s = 0; s < kSums; ++s) sum[s] = keep(l, sum[s] + t[s], sum[s]);
          });
          for (int s = 0; s < kSums; ++s) total[s] += lane_sum(sum[s]);
        });
        for (int s = 0; s < kSums; ++s) totals[s][r] = T(total[s]);
      }
      V sums[kSums], planes[kSweepPlanes];
      for (int s = 0; s < kSums; ++s) sums[s] = load(totals[s]);
      f.close(sweep, sums, kept, planes);
      save(sweep, row, rows, planes);
    }
  }

  // lanes beyond the last row hold zeros
  template <class Save>
  UNIGEN_NOINLINE void along_rows(int64_t row, int rows, V* kept, const Save& save) const {
    const F f = f_;
    alignas(kVectorBytes) T room[kIn][kRows];
    alignas(kVectorBytes) double totals[kSums][kRows];
    const auto column = [&](int64_t c, V* x) UNIGEN_FORCED {
      for (int k = 0; k < kIn; ++k) {
        const T* source = in_[k].read(in_[k].origin(c), row, rows, room[k]);
        x[k] = rows == kRows ? load(source) : load(source, First<T>{rows});
      }
    };
    V largest = constant<V>(-HUGE_VAL), next = largest, x[kIn];
    for (int64_t c = 0; c < partition_.cols; ++c) {
      column(c, x);
      insert(f.key(x), largest, next);
    }
    f.open(largest, next, kept);
    const int sweeps = f.sweeps();
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      for (int s = 0; s < kSums; ++s) {
        for (int r = 0; r < kRows; ++r) totals[s][r] = 0;
      }
      for (int64_t block = 0; block < partition_.cols; block += kFlush) {
        V sum[kSums], t[kSums];
        for (int s = 0; s < kSums; ++s) sum[s] = V(T(0));
        const int64_t end = smaller(partition_.cols, block + kFlush);
        for (int64_t c = block; c < end; ++c) {
          column(c, x);
          f.terms(sweep, kept, x, t);
          for (int s = 0; s < kSums; ++s) sum[s] = sum[s] + t[s];
        }
        for (int s = 0; s < kSums; ++s) add_lanes(totals[s], sum[s]);
      }
      V sums[kSums], planes[kSweepPlanes];
      for (int s = 0; s < kSums; ++s) {
        for (int r = 0; r < kRows; ++r) sums[s].v[r] = T(totals[s][r]);
      }
      f.close(sweep, sums, kept, planes);
      save(sweep, row, rows, planes);
    }
  }

  F f_;
  bool lanes_are_rows_;
  Partition partition_;
  Stream<T> in_[kIn];
};

// ---- one sum over everything ---------------------------------------------------------------------------------------

// One region for several tensors: all their elements, cut into units by shape alone.
class Flats {
 public:
  static constexpr int kMost = 64;  // tensors at a time

  // numel(i) elements of tensor i
  template <class T, class Numel>
  Flats(T, int count, const Numel& numel) : count_(count) {
    for (int i = 0; i < count; ++i) total_ += numel_[i] = numel(i);
    for (int i = 0; i < count; ++i) {
      const Partition partition(numel_[i], 1, false, lane_block<T>(numel_[i]), 1, larger(kUnit, ceil_div(total_, kMaxUnits)));
      unit_[i] = partition.block_rows;
      first_[i + 1] = first_[i] + partition.count;
    }
  }

  int64_t units() const { return first_[count_]; }
  int64_t units_end(int i) const { return first_[i + 1]; }

  // work(unit, tensor, its elements from, to), on as many threads as pay
  template <class Work>
  void run(const Parallel& parallel, const Work& work) const {
    const int64_t units_of_thread = ceil_div(kUnit * units(), larger(1, total_));  // small tensors are a unit each
    in_parallel(parallel, units(), units_of_thread, [&](int64_t begin, int64_t end) {
      int i = 0;
      for (int64_t unit = begin; unit < end; ++unit) {
        while (first_[i + 1] <= unit) ++i;
        const int64_t from = (unit - first_[i]) * unit_[i];
        work(unit, i, from, smaller(numel_[i], from + unit_[i]));
      }
    });
  }

 private:
  int count_;
  int64_t total_ = 0;
  int64_t numel_[kMost], unit_[kMost], first_[kMost + 1] = {};
};

// For each of `count` tensors in(i), at most Flats::kMost: the sum over all its elements of a value, in the order of
// RowResults for a column of rows; and of kOthers further quantities: value = f(x, others). with(i, run) calls run(f), whose
// type may differ from tensor to tensor. done(i, sum, others).
template <class T, int kOthers, class In, class With, class Done>
void flat_sums(const Parallel& parallel, int count, const In& in, const With& with, const Done& done) {
  using V = Vec<T>;
  constexpr int kRoom = kOthers ? kOthers : 1;
  const Flats flats(T(), count, [&](int i) { return in(i).first.rows * in(i).first.cols; });
  double partial[kMaxUnits + Flats::kMost][kRoom + 1];
  flats.run(parallel, [&](int64_t unit, int item, int64_t begin, int64_t end) {
    const Stream<T> stream(in(item).first, in(item).second, Axis::none, Axis::rows_cols);
    with(item, [&](auto value) {
      alignas(kVectorBytes) T room[kChunk<T>];
      double sums[kRoom + 1] = {};
      for (int64_t first = begin; first < end; first += kChunk<T>) {
        const int n = int(smaller(kChunk<T>, end - first));
        const T* source = stream.read(0, first, n, room);
        Chains<T> chains;
        V other[kRoom];
        for (int k = 0; k < kRoom; ++k) other[k] = V(T(0));
        for_vectors_in_turn<T, Chains<T>::kWays>(n, [&](int i, auto l, int way) UNIGEN_FORCED {
          V next[kRoom], &sum = chains.sum[way];
          sum = keep(l, sum + value(load(source + i, l), next), sum);
          for (int k = 0; k < kOthers; ++k) other[k] = keep(l, other[k] + next[k], other[k]);
        });
        sums[0] += chains.total();
        for (int k = 0; k < kOthers; ++k) sums[k + 1] += lane_sum(other[k]);
      }
      for (int k = 0; k <= kOthers; ++k) partial[unit][k] = sums[k];
    });
  });
  int64_t unit = 0;
  for (int i = 0; i < count; ++i) {
    double sums[kRoom + 1] = {};
    for (; unit < flats.units_end(i); ++unit) {
      for (int k = 0; k <= kOthers; ++k) sums[k] += partial[unit][k];
    }
    done(i, sums[0], sums + 1);
  }
}

// calls body(T()) with the arithmetic type of a dtype
template <class Body>
UNIGEN_INLINE void with_arithmetic(DType dtype, const Body& body) {
  if (dtype == DType::float64) {
    body(double());
  } else {
    body(float());
  }
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
