// Rows of log-weights: bounds, self-normalised weights and their gradients.
#include "../formulas/importance.h"

#include <type_traits>

#include "rows.cuh"

namespace unigen::cuda {
namespace {

// Maximum of t = log-weight / temperature, and the sums of e = exp(t - maximum) and of e times something else. Formed
// online: one read of the row, whatever its length.
template <class T>
struct Exponentials {
  T maximum = -T(HUGE_VAL), sum = 0, extra = 0;

  // to a larger maximum; `squares`: `extra` is the sum of e²
  UNIGEN_DEVICE void raise(T to, bool squares) {
    const T factor = exp(maximum - finite_shift(to));
    maximum = to;
    sum *= factor;
    extra *= squares ? factor * factor : factor;
  }
};

// extra(e, l) is what an element adds to the second sum
template <int R, int C, int U, class T, class E, class Extra>
UNIGEN_DEVICE void add(Exponentials<T> (&state)[R], const Pack<E, R * C> (&x)[U], const bool (&valid)[U],
                                    T inverse_temperature, bool squares, Extra extra_of) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    T maximum = state[r].maximum;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int c = 0; c < C; ++c)
        if (valid[u]) maximum = larger(maximum, x[u].template get<T>(r + c) * inverse_temperature);
    }
    const T shift = finite_shift(maximum);
    T sum = 0, extra = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (!valid[u]) continue;
        const T l = x[u].template get<T>(r + c);
        const T e = exp(l * inverse_temperature - shift);
        sum += e;
        extra += extra_of(e, l);
      }
    }
    state[r].raise(maximum, squares);
    state[r].sum += sum;
    state[r].extra += extra;
  }
}

template <class T>
UNIGEN_DEVICE void reduce(Exponentials<T>& s, const Group& group, bool extra, bool squares) {
  s.raise(group.reduce(s.maximum, Maximum()), squares);
  s.sum = group.reduce(s.sum, Plus());
  if (extra) s.extra = group.reduce(s.extra, Plus());
}

template <class T>
UNIGEN_DEVICE void merge(Exponentials<T>& s, Exponentials<T> other, bool squares) {
  const T maximum = larger(s.maximum, other.maximum);
  s.raise(maximum, squares);
  other.raise(maximum, squares);
  s.sum += other.sum;
  s.extra += other.extra;
}

template <class Element>
struct WeightRowsOp : WeightRows, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Exponentials<T>;
  static constexpr bool kReduces = true, kTotals = true;
  static constexpr int kVector = kWidest<E>, kUnroll = 4;
  template <int V>
  using Loaded = Pack<E, V>;

  T inverse_temperature, log_count;

  explicit WeightRowsOp(const WeightRows& a)
      : WeightRows(a),
        inverse_temperature(T(1 / a.temperature)),
        log_count(T(::log(double(a.grid.cols > 0 ? a.grid.cols : 1)))) {}

  UNIGEN_DEVICE bool squares() const { return kind == RowValue::effective_sample_size; }
  UNIGEN_DEVICE bool plain() const {
    return kind == RowValue::log_mean_exp || kind == RowValue::minus_log_mean_exp;
  }

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return place.template load<E>(log_w);
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At) const {
    if (plain()) {
      add<R, C>(state, x, valid, inverse_temperature, false, [](T, T) { return T(0); });
    } else {
      add<R, C>(state, x, valid, inverse_temperature, squares(), [this](T e, T l) {
        if (kind == RowValue::effective_sample_size) return e * e;
        return weighted(e, kind == RowValue::iwgan ? payload<Payload::softplus_of_minus>(l) : l);
      });
    }
  }

  UNIGEN_DEVICE void reduce(State& s, const Group& group) const { cuda::reduce(s, group, !plain(), squares()); }
  UNIGEN_DEVICE void merge(State& s, const State& other) const { cuda::merge(s, other, squares()); }

  UNIGEN_DEVICE double finish(const Rows& rows, int r, const State& s) const {
    const T shift = finite_shift(s.maximum);
    T result;
    switch (kind) {
      case RowValue::log_mean_exp: result = log_mean_given(shift, s.sum, log_count); break;
      case RowValue::minus_log_mean_exp: result = -log_mean_given(shift, s.sum, log_count); break;
      case RowValue::effective_sample_size: result = effective_samples(s.sum, s.extra); break;
      case RowValue::minus_surrogate: result = minus_surrogate(s.sum, s.extra); break;
      default: result = s.extra * inverse_sum(s.sum);
    }
    if (!reduction.reduce) rows.at<T>(value, r) = result;
    if (statistics.data) {
      T* planes = &rows.at<T>(statistics, r);
      planes[0] = shift;
      planes[grid.rows] = s.sum;
      if (kind == RowValue::iwgan) planes[2 * grid.rows] = result;
    }
    return double(result);
  }
};

template <class Element>
struct WeightRowsBackwardOp : WeightRowsBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = 4;
  template <int V>
  using Loaded = Pack<E, V>;

  T inverse_temperature, factor;

  explicit WeightRowsBackwardOp(const WeightRowsBackward& a)
      : WeightRowsBackward(a),
        inverse_temperature(T(1 / a.temperature)),
        factor(T((a.kind == RowValue::minus_log_mean_exp || a.kind == RowValue::minus_surrogate ? -1 : 1) *
                 a.reduction.scale / a.reduction.denominator)) {}

  struct Row {
    T shift, inverse, grad, loss;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return place.template load<E>(log_w);
  }

  UNIGEN_DEVICE Row context(const Rows& rows, int r, NoState) const {
    const T* planes = &rows.at<T>(statistics, r);
    return {planes[0], inverse_sum(planes[grid.rows]), rows.at<T>(this->grad, r) * factor,
            kind == RowValue::iwgan ? planes[2 * grid.rows] : T(0)};
  }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& x) const {
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v) {
      const Row& given = row[R > 1 ? v : 0];
      const T l = x.template get<T>(v);
      const T weight = exp(l * inverse_temperature - given.shift) * given.inverse;
      const T slope =
          kind == RowValue::iwgan ? iwgan_slope(l, weight, detach, given.loss, inverse_temperature) : weight;
      result[v] = weighted(given.grad, slope);
    }
    place.template store<E>(grad_log_w, result);
  }
};

template <class Element>
struct WeightsOp : Weights, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Exponentials<T>;
  static constexpr bool kReduces = true, kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = 4;
  template <int V>
  using Loaded = Pack<E, V>;

  T inverse_temperature;

  explicit WeightsOp(const Weights& a) : Weights(a), inverse_temperature(T(1 / a.temperature)) {}

  struct Row {
    T shift, inverse;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return place.template load<E>(log_w);
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At) const {
    add<R, C>(state, x, valid, inverse_temperature, false, [](T, T) { return T(0); });
  }

  UNIGEN_DEVICE void reduce(State& s, const Group& group) const { cuda::reduce(s, group, false, false); }
  UNIGEN_DEVICE void merge(State& s, const State& other) const { cuda::merge(s, other, false); }
  UNIGEN_DEVICE double finish(const Rows&, int, const State&) const { return 0; }

  UNIGEN_DEVICE Row context(const Rows&, int, const State& s) const {
    return {finite_shift(s.maximum), inverse_sum(s.sum)};
  }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& x) const {
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v) {
      const Row& given = row[R > 1 ? v : 0];
      result[v] = exp(x.template get<T>(v) * inverse_temperature - given.shift) * given.inverse;
    }
    place.template store<T>(weights, result);
  }
};

template <class Element>
struct WeightsBackwardOp : WeightsBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Sum;
  static constexpr bool kReduces = true, kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = sizeof(E) == 2 ? 2 : 4;

  T inverse_temperature;

  explicit WeightsBackwardOp(const WeightsBackward& a)
      : WeightsBackward(a), inverse_temperature(T(1 / a.temperature)) {}

  template <int V>
  struct Loaded {
    Pack<T, V> grad, weight;
  };
  using Row = T;  // sum of weight · grad

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<T>(grad), place.template load<T>(weights)};
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T sum = 0;
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (valid[u]) sum += weighted(x[u].grad.x[r + c], x[u].weight.x[r + c]);
      }
      state[r].value += double(sum);
    }
  }

  UNIGEN_DEVICE double finish(const Rows&, int, const State&) const { return 0; }
  UNIGEN_DEVICE Row context(const Rows&, int, const State& s) const { return T(s.value); }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& x) const {
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v)
      result[v] = weighted(x.grad.x[v] - row[R > 1 ? v : 0], x.weight.x[v]) * inverse_temperature;
    place.template store<E>(grad_log_w, result);
  }
};

// a copy of the partition of tvo that the device can read
constexpr int kMaxPoints = 256;
struct NoPartition {
  UNIGEN_DEVICE const double* get() const { return nullptr; }
};
struct Partition {
  double points[kMaxPoints];
  UNIGEN_DEVICE const double* get() const { return points; }
};

template <class Element, class Estimator_, class Points>
struct EstimatorsOp : Estimators {
  using E = Element;
  using T = Arithmetic<E>;
  using F = Estimator_;

  F of_host;
  Points partition;

  UNIGEN_DEVICE F estimator() const {
    F f = of_host;
    if constexpr (!std::is_same<Points, NoPartition>::value) f.partition = partition.get();
    return f;
  }
  UNIGEN_DEVICE void load(const Rows& rows, int64_t col, T (&x)[F::kIn]) const {
    const Place<1, 1> place(rows, col, grid);
#pragma unroll
    for (int k = 0; k < F::kIn; ++k) x[k] = place.template load<E>(in[k]).template get<T>(0);
  }
  UNIGEN_DEVICE void save(const Rows& rows, int64_t plane, T x) const {
    (&rows.at<T>(statistics, 0))[plane * grid.rows] = x;
  }
};

template <class Element, class F>
struct EstimatorSlopeOp : EstimatorsBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = F::kOut > 1 ? 1 : 4;
  template <int V>
  struct Loaded {
    Pack<E, V> x[F::kIn];
  };
  struct Row {
    T kept[F::kKept];
    bool counts;  // whether there is a gradient
  };

  F f;

  EstimatorSlopeOp(const EstimatorsBackward& a, const F& f) : EstimatorsBackward(a), f(f) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    Loaded<R * C> loaded;
#pragma unroll
    for (int k = 0; k < F::kIn; ++k) loaded.x[k] = place.template load<E>(in[k]);
    return loaded;
  }

  UNIGEN_DEVICE Row context(const Rows& rows, int r, NoState) const {
    T operands[F::kGiven + F::kPlanes];
#pragma unroll
    for (int k = 0; k < F::kGiven; ++k) operands[k] = rows.at<T>(F::kGivenValue && k == 1 ? value : this->grad[k], r);
    const T* planes = &rows.at<T>(statistics, r);
#pragma unroll
    for (int p = 0; p < F::kPlanes; ++p) operands[F::kGiven + p] = planes[p * grid.rows];
    Row row;
    f.prepare(operands, row.kept);
    row.counts = operands[0] != 0 || (F::kGiven == 2 && !F::kGivenValue && operands[1] != 0);
    return row;
  }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& loaded) const {
    T results[F::kOut][R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v) {
      T x[F::kIn], y[F::kOut];
#pragma unroll
      for (int k = 0; k < F::kIn; ++k) x[k] = loaded.x[k].template get<T>(v);
      f(row[R > 1 ? v : 0].kept, x, y);
#pragma unroll
      for (int k = 0; k < F::kOut; ++k) results[k][v] = row[R > 1 ? v : 0].counts ? y[k] : T(0);
    }
#pragma unroll
    for (int k = 0; k < F::kOut; ++k)
      if (out[k].data) place.template store<E>(out[k], results[k]);
  }
};

// The sum of as many slopes as there are sweeps: the row's numbers are read as they are needed.
template <class Element>
struct TvoSlopeOp : EstimatorsBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  static constexpr bool kWrites = true;
  static constexpr int kVector = 1, kUnroll = 1;
  template <int V>
  using Loaded = Pack<E, V>;
  struct Row {
    const T* planes;
    T scale;
  };

  Partition partition;

  explicit TvoSlopeOp(const EstimatorsBackward& a) : EstimatorsBackward(a) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return place.template load<E>(in[0]);
  }
  UNIGEN_DEVICE Row context(const Rows& rows, int r, NoState) const {
    return {&rows.at<T>(statistics, r), rows.at<T>(this->grad[0], r) * T(reduction.scale / reduction.denominator)};
  }
  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& x) const {
    const Tvo f{{double(grid.cols)}, partition.get(), options.points};
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v) {
      const Row& given = row[R > 1 ? v : 0];
      const T distance = x.template get<T>(v) - given.planes[0];
      T sum = 0;
      for (int sweep = 0; sweep < f.sweeps(); ++sweep) {
        const T inverse = given.scale * inverse_sum(given.planes[(1 + 2 * sweep) * grid.rows]);
        sum += f.slope(sweep, distance, inverse, given.planes[(2 + 2 * sweep) * grid.rows]);
      }
      result[v] = given.scale == 0 ? T(0) : sum;
    }
    place.template store<E>(out[0], result);
  }
};

inline const char* copy_partition(const EstimatorOptions& options, Partition& partition) {
  if (options.points > kMaxPoints) return "expected a partition of at most 256 points";
  for (int i = 0; i < options.points; ++i) partition.points[i] = options.partition[i];
  return nullptr;
}

// A warp fits a row: lanes are points of the grid, or, for the mean, elements.
template <class E>
__global__ void __launch_bounds__(kThreads, kResident) pareto_kernel(const __grid_constant__ ParetoShape a) {
  constexpr unsigned kAll = 0xffffffff;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double likelihoods[kWarps][kMaxParetoPoints];
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const auto sum_of = [](double x) {
    for (int half = kWarp / 2; half; half /= 2) x += __shfl_xor_sync(kAll, x, half);
    return x;
  };
  for (int64_t row = int64_t(blockIdx.x) * kWarps + warp; row < a.rows; row += int64_t(gridDim.x) * kWarps) {
    const E* const values = static_cast<const E*>(a.values) + row * (a.count + 1);
    E* const shape = static_cast<E*>(a.shapes) + row;
    const ParetoTail tail(values[0], values[a.count]);
    double counted = 0;
    for (int64_t i = lane; i < a.count; i += kWarp) counted += tail.counts(values[i]);
    const int64_t n = int64_t(sum_of(counted)), points = pareto_points(n);
    if (tail.top != tail.top || n < kLeastTail) {
      if (lane == 0) *shape = E(tail.top != tail.top ? tail.top : double(HUGE_VAL));
      continue;
    }
    const double scale = 1 / (3 * tail.excess(values[ParetoTail::quartile(n)])), inverse = 1 / tail.excess(values[0]);
    double highest = -double(HUGE_VAL);
    for (int64_t g = lane; g < points; g += kWarp) {
      const double b = ParetoTail::place(g, points) * scale + inverse;
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += ::log1p(-b * tail.excess(values[i]));
      likelihoods[warp][g] = ParetoTail::log_likelihood(b, sum / double(n), double(n));
      highest = fmax(highest, likelihoods[warp][g]);
    }
    for (int half = kWarp / 2; half; half /= 2) highest = fmax(highest, __shfl_xor_sync(kAll, highest, half));
    double total = 0, kept = 0, sum = 0;
    for (int64_t g = lane; g < points; g += kWarp) total += ::exp(likelihoods[warp][g] - highest);
    total = sum_of(total);
    for (int64_t g = lane; g < points; g += kWarp) {
      const double e = ::exp(likelihoods[warp][g] - highest);
      if (e < ParetoTail::least_share() * total) continue;
      kept += e;
      sum += e * (ParetoTail::place(g, points) * scale + inverse);
    }
    kept = sum_of(kept);
    const double best = sum_of(sum) / kept;
    double logarithms = 0;
    for (int64_t i = lane; i < n; i += kWarp) logarithms += ::log1p(-best * tail.excess(values[i]));
    logarithms = sum_of(logarithms);
    if (lane == 0) *shape = E(ParetoTail::with_prior(logarithms / double(n), double(n)));
  }
}

}  // namespace

const char* weight_rows(const WeightRows& arguments, const Launch& launch) {
  WeightRows a = arguments;
  align(a.grid, {&a.log_w, &a.value, &a.statistics});
  return dispatch(a.dtype, [&](auto e) {
    return run_rows(WeightRowsOp<decltype(e)>(a), {{&a.log_w, sizeof(e)}}, launch, a.reduction.reduce);
  });
}

const char* weight_rows_backward(const WeightRowsBackward& arguments, const Launch& launch) {
  WeightRowsBackward a = arguments;
  align(a.grid, {&a.grad, &a.log_w, &a.statistics, &a.grad_log_w});
  return dispatch(a.dtype, [&](auto e) {
    return run_rows(WeightRowsBackwardOp<decltype(e)>(a), {{&a.log_w, sizeof(e)}, {&a.grad_log_w, sizeof(e), true}},
                    launch);
  });
}

const char* weights(const Weights& arguments, const Launch& launch) {
  Weights a = arguments;
  align(a.grid, {&a.log_w, &a.weights});
  return dispatch(a.dtype, [&](auto e) {
    using T = Arithmetic<decltype(e)>;
    return run_rows(WeightsOp<decltype(e)>(a), {{&a.log_w, sizeof(e)}, {&a.weights, sizeof(T), true}}, launch);
  });
}

const char* weights_backward(const WeightsBackward& arguments, const Launch& launch) {
  WeightsBackward a = arguments;
  align(a.grid, {&a.grad, &a.weights, &a.grad_log_w});
  return dispatch(a.dtype, [&](auto e) {
    using T = Arithmetic<decltype(e)>;
    return run_rows(WeightsBackwardOp<decltype(e)>(a),
                    {{&a.weights, sizeof(T)}, {&a.grad, sizeof(T)}, {&a.grad_log_w, sizeof(e), true}}, launch);
  });
}

const char* estimators(const Estimators& arguments, const Launch& launch) {
  Estimators a = arguments;
  align(a.grid, {&a.in[0], &a.in[1], &a.value[0], &a.value[1], &a.statistics});
  return dispatch(a.dtype, [&](auto e) {
    using E = decltype(e);
    return with_estimator(a.options, double(a.grid.cols), nullptr, [&](auto f) -> const char* {
      using F = decltype(f);
      if constexpr (std::is_same<F, Tvo>::value) {
        EstimatorsOp<E, F, Partition> op{a, f, {}};
        if (const char* error = copy_partition(a.options, op.partition)) return error;
        return run_sweeps(op, launch);
      } else {
        return run_sweeps(EstimatorsOp<E, F, NoPartition>{a, f, {}}, launch);
      }
    });
  });
}

const char* estimators_backward(const EstimatorsBackward& arguments, const Launch& launch) {
  EstimatorsBackward a = arguments;
  align(a.grid, {&a.grad[0], &a.grad[1], &a.in[0], &a.in[1], &a.value, &a.statistics, &a.out[0], &a.out[1]});
  return dispatch(a.dtype, [&](auto e) -> const char* {
    using E = decltype(e);
    constexpr int bytes = sizeof(E);
    if (a.options.kind == EstimatorKind::tvo) {
      TvoSlopeOp<E> op(a);
      if (const char* error = copy_partition(a.options, op.partition)) return error;
      return run_rows(op, {{&a.in[0], bytes}, {&a.out[0], bytes, true}}, launch);
    }
    return with_slope(a.options, double(a.grid.cols), a.reduction.scale / a.reduction.denominator, [&](auto f) {
      return run_rows(EstimatorSlopeOp<E, decltype(f)>(a, f),
                      {{&a.in[0], bytes}, {&a.in[1], bytes}, {&a.out[0], bytes, true}, {&a.out[1], bytes, true}}, launch);
    });
  });
}

const char* pareto_shape(const ParetoShape& a, const Launch& launch) {
  if (a.rows == 0) return nullptr;
  const int64_t blocks = clamp(divide_up(a.rows, kThreads / kWarp), 1, 65535);
  if (a.dtype == DType::float64) return start(pareto_kernel<double>, blocks, 1, launch, a);
  return start(pareto_kernel<float>, blocks, 1, launch, a);
}

}  // namespace unigen::cuda
