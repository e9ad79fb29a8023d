// Kernels of log-weights: bounds, self-normalised weights, and their gradients. Columns are the K samples.
#include "../formulas/importance.h"

#include <vector>

#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

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
      return weight_rows_as<T, WeightedPayload<Payload::identity>>(
          a, parallel, [](int n, const T*, const T*, const double* sum, const double* extra, T* values) {
            for (int i = 0; i < n; ++i) values[i] = T(minus_surrogate(sum[i], extra[i]));
          });
    case RowValue::iwgan:
      return weight_rows_as<T, WeightedPayload<Payload::softplus_of_minus>>(
          a, parallel, [](int n, const T*, const T*, const double* sum, const double* extra, T* values) {
            for (int i = 0; i < n; ++i) values[i] = T(extra[i] * inverse_sum(sum[i]));
          });
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
    return exp_of_distance((scaled ? log_w / Vec<T>(temperature) : log_w) - row[1]);
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
  Map<T, kRow, 1, 1, 1>(a.grid, row, &in, &out).run(parallel, f);
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
  static constexpr int kStates = 1, kKept = 1, kFactor = 1;
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

template <class T>
void estimators_in(const Estimators& a, const Parallel& parallel) {
  with_estimator(a.options, double(a.grid.cols), a.options.partition, [&](auto f) {
    using F = decltype(f);
    constexpr int kValues = F::kValues, kRoom = kValues ? kValues : 1;
    const Array in[2] = {elements(a.in[0], a), elements(a.in[1], a)};
    const RowSweeps<T, F> sweeps(a.grid, in, f);
    RowResults<T> results[2] = {{a.grid, arithmetic(a.value[0], a), a.reduction, sweeps.units()},
                                {a.grid, arithmetic(a.value[1], a), a.reduction, sweeps.units()}};
    const Stream<T> planes(a.grid, arithmetic(a.statistics, a), Axis::none, Axis::rows);
    const auto write = [&](int plane, int64_t row, int n, Vec<T> x) {
      alignas(kVectorBytes) T numbers[Vec<T>::size];
      store(numbers, x);
      planes.write(plane * a.grid.rows, row, n, numbers);
    };
    sweeps.run(
        parallel,
        [&](int sweep, int64_t row, int n, const Vec<T>* left) {
          for (int p = 0; p < F::kSweepPlanes; ++p) write(F::kPlanes + sweep * F::kSweepPlanes + p, row, n, left[p]);
        },
        [&](int64_t unit, int64_t row, int n, const Vec<T>* kept) {
          for (int p = 0; p < F::kPlanes; ++p) write(p, row, n, kept[p]);
          Vec<T> values[kRoom];
          f.values(kept, values);
          for (int i = 0; i < kValues; ++i) {
            alignas(kVectorBytes) T numbers[Vec<T>::size];
            store(numbers, values[i]);
            results[i].take(unit, row, n, numbers);
          }
        });
    for (int i = 0; i < kValues; ++i) results[i].close();
  });
}

template <class T, class F>
void estimator_slope(const EstimatorsBackward& a, const Parallel& parallel, const F& f) {
  constexpr int kGiven = F::kGiven, kPlanes = F::kPlanes;
  const Operand given[2] = {a.grad[0], F::kGivenValue ? a.value : a.grad[1]};
  Array row[kGiven + kPlanes], in[2], results[2];
  for (int k = 0; k < kGiven; ++k) row[k] = arithmetic(given[k], a);
  for (int plane = 0; plane < kPlanes; ++plane) {
    Operand operand = a.statistics;
    operand.data = static_cast<T*>(operand.data) + plane * a.grid.rows;
    row[kGiven + plane] = arithmetic(operand, a);
  }
  for (int k = 0; k < 2; ++k) {
    in[k] = elements(a.in[k], a);
    results[k] = elements(a.out[k], a);
  }
  constexpr int kFactors = kGiven - F::kGivenValue == 1;  // of two gradients, each reaches its own results
  Map<T, kGiven + kPlanes, F::kIn, F::kOut, kFactors>(a.grid, row, in, results).run(parallel, f);
}

// The sum of as many slopes as there are sweeps, each of two numbers of the row.
template <class T>
void tvo_backward(const EstimatorsBackward& a, T factor, const Parallel& parallel) {
  using V = Vec<T>;
  const Tvo f = {{double(a.grid.cols)}, a.options.partition, a.options.points};
  const Partition partition(a.grid.rows, a.grid.cols, true);
  const Stream<T> grad(a.grid, arithmetic(a.grad[0], a), Axis::rows, Axis::none);
  const Stream<T> in(a.grid, elements(a.in[0], a), Axis::rows, Axis::cols);
  const Stream<T> out(a.grid, elements(a.out[0], a), Axis::rows, Axis::cols);
  const Stream<T> planes(a.grid, arithmetic(a.statistics, a), Axis::rows, Axis::none);
  partition.run(parallel, [&](int64_t u) {
    alignas(kVectorBytes) T room[kChunk<T>], slopes[kChunk<T>];
    const T* plane = reinterpret_cast<const T*>(a.statistics.data);
    for (int64_t r = partition.row_begin(u); r < partition.row_end(u); ++r) {
      const T* of_row = plane + planes.origin(r);
      const V base(of_row[0]), scale(grad.value(r) * factor);
      for (int64_t c = partition.col_begin(u); c < partition.col_end(u); c += kChunk<T>) {
        const int n = int(smaller(kChunk<T>, partition.col_end(u) - c));
        const T* source = in.read(in.origin(r), c, n, room);
        for (int sweep = 0; sweep < f.sweeps(); ++sweep) {
          const V inverse = scale * inverse_sum(V(of_row[(1 + 2 * sweep) * a.grid.rows]));
          const V mean(of_row[(2 + 2 * sweep) * a.grid.rows]);
          for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
            const V slope = f.slope(sweep, load(source + i, l) - base, inverse, mean);
            store(slopes + i, sweep == 0 ? slope : load(slopes + i) + slope);
          });
        }
        if (grad.value(r) == 0)
          for (int i = 0; i < n; ++i) slopes[i] = 0;
        out.write(out.origin(r), c, n, slopes);
      }
    }
  });
}

template <class T>
void estimators_backward_in(const EstimatorsBackward& a, const Parallel& parallel) {
  const double factor = a.reduction.scale / a.reduction.denominator;
  if (a.options.kind == EstimatorKind::tvo) return tvo_backward<T>(a, T(factor), parallel);
  with_slope(a.options, double(a.grid.cols), factor, [&](auto f) { estimator_slope<T>(a, parallel, f); });
}

// Zhang and Stephens' fit: the mean of b over a grid of points, each weighed by its likelihood. Lanes are points, or, for
// the mean, elements.
class ParetoFit {
  using V = Vec<double>;
  static constexpr int64_t kRoom = kMaxParetoPoints + V::size;

 public:
  explicit ParetoFit(int64_t count) : excess_(size_t(round_up(count, V::size))) {}

  template <class T>
  double shape(const T* values, int64_t count) {
    const ParetoTail tail(values[0], values[count]);
    if (tail.top != tail.top) return tail.top;
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) n += tail.counts(values[i]);
    if (n < kLeastTail) return HUGE_VAL;
    for (int64_t i = 0; i < n; i += V::size) {  // they are the first n
      alignas(kVectorBytes) double x[V::size] = {};
      for (int64_t l = 0; l < smaller(V::size, n - i); ++l) x[l] = double(values[i + l]) - tail.top;
      store(excess_.data() + i, exp(load(x)) - V(tail.least));
    }
    if (n != placed_) place(n);
    const double scale = 1 / (3 * excess_[size_t(ParetoTail::quartile(n))]), inverse = 1 / excess_[0];

    const int64_t points = pareto_points(n);
    V top(-HUGE_VAL);
    for (int64_t g = 0; g < points; g += V::size) {
      const V b = load(places_ + g) * V(scale) + V(inverse);
      V sum(0.0);
      for (int64_t i = 0; i < n; ++i) sum = sum + log1p(-b * V(excess_[size_t(i)]));
      const V found = ParetoTail::log_likelihood(b, sum * V(1 / double(n)), double(n));
      const V likelihood = g + V::size <= points ? found : select(lanes(First<double>{int(points - g)}), found, V(-HUGE_VAL));
      store(b_ + g, b);
      store(likelihood_ + g, likelihood);
      top = max(likelihood, top);
    }
    const V highest(lane_max(top));
    double total = 0, kept = 0, sum = 0;
    for (int64_t g = 0; g < points; g += V::size) {
      const V e = exp(load(likelihood_ + g) - highest);
      store(likelihood_ + g, e);
      total += lane_sum(e);
    }
    for (int64_t g = 0; g < points; ++g) {
      if (likelihood_[g] < ParetoTail::least_share() * total) continue;
      kept += likelihood_[g];
      sum += likelihood_[g] * b_[g];
    }
    const double best = sum / kept;
    V logarithms(0.0);
    for_vectors<double>(int(n), [&](int i, auto l) UNIGEN_FORCED {
      logarithms = keep(l, logarithms + log1p(V(-best) * load(excess_.data() + i, l)), logarithms);
    });
    return ParetoTail::with_prior(lane_sum(logarithms) / double(n), double(n));
  }

 private:
  void place(int64_t n) {
    const int64_t points = pareto_points(n);
    for (int64_t g = 0; g < round_up(points, V::size); ++g) places_[g] = ParetoTail::place(smaller(g, points - 1), points);
    placed_ = n;
  }

  std::vector<double> excess_;
  alignas(kVectorBytes) double places_[kRoom], b_[kRoom], likelihood_[kRoom];
  int64_t placed_ = 0;
};

template <class T>
void pareto_shape_in(const ParetoShape& a, const Parallel& parallel) {
  in_parallel(parallel, a.rows, grain_of(16 * pareto_points(a.count) * a.count), [&](int64_t begin, int64_t end) {
    ParetoFit fit(a.count);
    for (int64_t row = begin; row < end; ++row)
      static_cast<T*>(a.shapes)[row] = T(fit.shape(static_cast<const T*>(a.values) + row * (a.count + 1), a.count));
  });
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
void estimators(const Estimators& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { estimators_in<decltype(t)>(a, parallel); });
}
void estimators_backward(const EstimatorsBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { estimators_backward_in<decltype(t)>(a, parallel); });
}
void pareto_shape(const ParetoShape& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { pareto_shape_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
