// Kernels of log-weights: bounds, self-normalised weights, and their gradients. Columns are the K samples.
#include "../formulas/importance.h"

#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// what RowExponentials sums beside the exponentials
struct NoExtra {
  static constexpr bool kExtra = false, kSquares = false, kNormalize = false;
  template <class V>
  UNIGEN_INLINE V extra(V, V e) const {
    return e;
  }
};
struct Normalize : NoExtra {
  static constexpr bool kNormalize = true;
};
struct Squares {
  static constexpr bool kExtra = true, kSquares = true, kNormalize = false;
  template <class V>
  UNIGEN_INLINE V extra(V, V e) const {
    return e * e;
  }
};
template <Payload P>
struct WeightedPayload {
  static constexpr bool kExtra = true, kSquares = false, kNormalize = false;
  template <class V>
  UNIGEN_INLINE V extra(V log_w, V e) const {
    return weighted(e, payload<P>(log_w));
  }
};

// `statistics` holds planes of `rows` numbers
template <class T>
Stream<T> statistics_plane(const Grid& grid, const Problem& problem, const Operand& statistics, int plane) {
  Operand operand = statistics;
  if (operand.data) operand.data = static_cast<T*>(operand.data) + plane * grid.rows;
  return Stream<T>(grid, arithmetic(operand, problem), Axis::none, Axis::rows);
}

// row_value(n, shift, sum, extra, values): the values of n rows
template <class T, class F, class RowFormula>
void weight_rows_as(const WeightRows& a, const Parallel& parallel, const RowFormula& row_value) {
  const RowExponentials<T, F> exponentials(a.grid, elements(a.log_w, a), a.temperature);
  RowResults<T> results(a.grid, arithmetic(a.value, a), a.reduction, exponentials.units());
  const bool keep_statistics = a.statistics.data, keep_row = a.kind == RowValue::iwgan;
  Stream<T> planes[3];
  for (int p = 0; p < 3; ++p) planes[p] = statistics_plane<T>(a.grid, a, a.statistics, p);
  exponentials.run(parallel, [&](int64_t unit, int64_t row, int n, const T* shift, const double* sum, const double* extra) {
    alignas(kVectorBytes) T values[kChunk<T>], sums[kChunk<T>];
    for (int i = 0; i < n; ++i) sums[i] = T(sum[i]);
    row_value(n, shift, sums, sum, extra, values);
    if (keep_statistics) {
      planes[0].write(0, row, n, shift);
      planes[1].write(0, row, n, sums);
      if (keep_row) planes[2].write(0, row, n, values);
    }
    results.take(unit, row, n, values);
  });
  results.close();
}

template <class T>
void weight_rows_in(const WeightRows& a, const Parallel& parallel) {
  const double count = double(a.grid.cols);
  const auto weighted_mean = [](double sign) {
    return [sign](int n, const T*, const T*, const double* sum, const double* extra, T* values) {
      for (int i = 0; i < n; ++i) values[i] = T(sign * extra[i] * inverse_sum(sum[i]));
    };
  };
  switch (a.kind) {
    case RowValue::log_mean_exp:
    case RowValue::minus_log_mean_exp: {
      const bool minus = a.kind == RowValue::minus_log_mean_exp;
      return weight_rows_as<T, NoExtra>(
          a, parallel, [&](int n, const T* shift, const T* sum, const double*, const double*, T* values) {
            for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
              const Vec<T> value = log_mean(load(shift + i, l), load(sum + i, l), count);
              store(values + i, minus ? -value : value);
            });
          });
    }
    case RowValue::minus_surrogate:
      return weight_rows_as<T, WeightedPayload<Payload::identity>>(a, parallel, weighted_mean(-1));
    case RowValue::iwgan:
      return weight_rows_as<T, WeightedPayload<Payload::softplus_of_minus>>(a, parallel, weighted_mean(1));
    case RowValue::effective_sample_size:
      return weight_rows_as<T, Squares>(
          a, parallel, [](int n, const T*, const T*, const double* sum, const double* squares, T* values) {
            for (int i = 0; i < n; ++i) values[i] = T(effective_samples(sum[i], squares[i]));
          });
  }
}

// row operands: grad, shift, sum
template <class T>
struct WeightSlope {
  static constexpr int kKept = 2;  // coefficient, shift
  bool scaled;
  T temperature, factor;

  UNIGEN_INLINE void prepare(const Vec<T>* operands, Vec<T>* row) const {
    row[0] = operands[0] * Vec<T>(factor) * inverse_sum(operands[2]);
    row[1] = operands[1];
  }
  UNIGEN_INLINE Vec<T> exponential(const Vec<T>* row, Vec<T> log_w) const {
    return exp((scaled ? log_w / Vec<T>(temperature) : log_w) - row[1]);
  }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    out[0] = exponential(row, in[0]) * row[0];
  }
};

// row operands: grad, shift, sum, row loss
template <class T, bool kDetach>
struct IwganSlope : WeightSlope<T> {
  static constexpr int kKept = 3;  // coefficient, shift, row loss

  UNIGEN_INLINE void prepare(const Vec<T>* operands, Vec<T>* row) const {
    WeightSlope<T>::prepare(operands, row);
    row[2] = operands[3];
  }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    const Vec<T> e = this->exponential(row, in[0]);
    const Vec<T> inverse_temperature(T(1) / this->temperature);
    out[0] = iwgan_slope(in[0], e, kDetach, row[2], inverse_temperature) * row[0];
  }
};

template <class T, int kRow, class F>
void weight_rows_backward_as(const WeightRowsBackward& a, const Parallel& parallel, const F& f) {
  Array row[4] = {arithmetic(a.grad, a)};
  for (int plane = 0; plane + 1 < kRow; ++plane) {
    Operand operand = a.statistics;
    operand.data = static_cast<T*>(operand.data) + plane * a.grid.rows;
    row[plane + 1] = arithmetic(operand, a);
  }
  const Array in = elements(a.log_w, a), out = elements(a.grad_log_w, a);
  Map<T, kRow, 1, 1>(a.grid, row, &in, &out).run(parallel, f);
}

template <class T>
void weight_rows_backward_in(const WeightRowsBackward& a, const Parallel& parallel) {
  const double sign = a.kind == RowValue::minus_log_mean_exp || a.kind == RowValue::minus_surrogate ? -1 : 1;
  const WeightSlope<T> slope = {a.temperature != 1, T(a.temperature),
                                T(sign * a.reduction.scale / a.reduction.denominator)};
  if (a.kind != RowValue::iwgan) return weight_rows_backward_as<T, 3>(a, parallel, slope);
  if (a.detach) return weight_rows_backward_as<T, 4>(a, parallel, IwganSlope<T, true>{slope});
  weight_rows_backward_as<T, 4>(a, parallel, IwganSlope<T, false>{slope});
}

// Rows not normalised at once (too long, or their weights not contiguous): these are the gradient of log_mean_exp under a
// grad of 1.
template <class T>
void weights_in(const Weights& a, const Parallel& parallel) {
  const Array in = elements(a.log_w, a), out = arithmetic(a.weights, a);
  const RowExponentials<T, Normalize> exponentials(a.grid, in, a.temperature, {}, out);
  const WeightSlope<T> weight = {a.temperature != 1, T(a.temperature), T(1)};
  const bool done = exponentials.normalizes(), split = exponentials.split();
  exponentials.run(parallel, [&](int64_t, int64_t first, int n, const T* shift, const double* sum, const double*) {
    if (done) return;
    alignas(kVectorBytes) T sums[kChunk<T>];
    for (int i = 0; i < n; ++i) sums[i] = T(sum[i]);
    const Array row[3] = {arithmetic({}, a, 1), rows_from(shift, first, a.grid), rows_from<T>(sums, first, a.grid)};
    const Map<T, 3, 1, 1> map(a.grid, row, &in, &out);
    if (split) {
      map.run(parallel, weight);
    } else {
      map.region(weight, first, first + n);
    }
  });
}

// in: weights, grad; the row's total: their products
template <class T>
struct SoftmaxSlope {
  static constexpr int kStates = 1, kKept = 1;
  T inverse_temperature;

  UNIGEN_INLINE void add(Vec<T>* state, const Vec<T>* in) const { state[0] = state[0] + in[0] * in[1]; }
  UNIGEN_INLINE Vec<T> close(const Vec<T>* state) const { return state[0]; }
  UNIGEN_INLINE void prepare(const Vec<T>* dot, Vec<T>* row) const { row[0] = dot[0]; }
  UNIGEN_INLINE void operator()(const Vec<T>* row, const Vec<T>* in, Vec<T>* out) const {
    out[0] = in[0] * (in[1] - row[0]) * Vec<T>(inverse_temperature);
  }
};

template <class T>
void weights_backward_in(const WeightsBackward& a, const Parallel& parallel) {
  const Array in[2] = {arithmetic(a.weights, a), arithmetic(a.grad, a)};
  RowSumMap<T, 2, SoftmaxSlope<T>>(a.grid, in, elements(a.grad_log_w, a), {T(1 / a.temperature)}).run(parallel);
}

}  // namespace

void weight_rows(const WeightRows& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { weight_rows_in<decltype(t)>(a, parallel); });
}
void weight_rows_backward(const WeightRowsBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { weight_rows_backward_in<decltype(t)>(a, parallel); });
}
void weights(const Weights& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { weights_in<decltype(t)>(a, parallel); });
}
void weights_backward(const WeightsBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { weights_backward_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
