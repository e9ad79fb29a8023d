// Kernels of Gaussian divergences and of the reparameterised sample. Columns are the event.
#include "../formulas/divergence.h"

#include "noise.h"
#include "rows.h"

#include <cstring>

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// How much of the options the compiler knows: all but the bounds of a clamp in the usual forms. unit: of variances 1, the
// squared error of an autoencoder, which would spend more than half of its time on exponentials of 0.
enum class Form { plain, clamped, general, unit };

template <Form F>
struct Options {
  SpreadOptions options;

  UNIGEN_INLINE SpreadOptions get() const {
    if constexpr (F == Form::plain) return {Spread::logvar, -HUGE_VAL, HUGE_VAL};
    if constexpr (F == Form::clamped) return {Spread::logvar, options.clamp_min, options.clamp_max};
    return options;
  }
};

inline Form form_of(const SpreadOptions& options) {
  if (options.spread != Spread::logvar) return Form::general;
  return options.clamped() ? Form::clamped : Form::plain;
}

// in: mean, spread (, prior mean, prior spread)
template <Form F, bool kPrior>
struct KlFormula {
  static constexpr int kInputs = kPrior ? 4 : 2;

  Options<F> options;
  bool has_prior_spread;
  double dim_floor;

  template <class V>
  UNIGEN_INLINE auto at(const V* in) const {
    if constexpr (F == Form::unit) {
      return UnitKl<V>(in[0], in[2]);
    } else if constexpr (kPrior) {
      return PriorKl<V>(in[0], in[1], in[2], in[3], has_prior_spread, options.get());
    } else {
      return StandardKl<V>(in[0], in[1], options.get());
    }
  }
};

template <Form F, bool kPrior>
struct KlSum : KlFormula<F, kPrior> {
  static constexpr int kStates = 1;

  template <class V>
  UNIGEN_INLINE void add(V* state, const V* in) const {
    state[0] = state[0] + maximum(this->at(in).value, constant<V>(this->dim_floor));
  }
  template <class V>
  UNIGEN_INLINE V close(const V* state) const {
    return state[0];
  }
};

// Whether the operand is a single 0, whatever the grid.
inline bool one_zero(const Operand& operand, const Problem& problem) {
  if (problem.grid.rows == 0 || problem.grid.cols == 0) return false;
  for (int d = 0; d < kMaxDims; ++d)
    if (operand.row[d] != 0 || operand.col[d] != 0) return false;
  const double zero = 0;
  return std::memcmp(operand.data, &zero, problem.dtype == DType::float64 ? 8 : problem.dtype == DType::float32 ? 4 : 2) == 0;
}

// calls body(formula) with the instance of Formula that fits
template <template <Form, bool> class Formula, class Arguments, class Body>
UNIGEN_INLINE void with_formula(const Arguments& a, const Body& body) {
  const bool spread = a.prior_spread.data;
  const Form form = form_of(a.options);
  if (a.has_prior()) {
    if (form == Form::plain && !spread && one_zero(a.spread, a))
      return body(Formula<Form::unit, true>{{{a.options}, spread, a.dim_floor}});
    if (form == Form::plain) return body(Formula<Form::plain, true>{{{a.options}, spread, a.dim_floor}});
    return body(Formula<Form::general, true>{{{a.options}, spread, a.dim_floor}});
  }
  if (form == Form::plain) return body(Formula<Form::plain, false>{{{a.options}, spread, a.dim_floor}});
  if (form == Form::clamped) return body(Formula<Form::clamped, false>{{{a.options}, spread, a.dim_floor}});
  body(Formula<Form::general, false>{{{a.options}, spread, a.dim_floor}});
}

template <class T>
void gaussian_kl_in(const GaussianKl& a, const Parallel& parallel) {
  const Array in[4] = {elements(a.mean, a), elements(a.spread, a), elements(a.prior_mean, a), elements(a.prior_spread, a)};
  with_formula<KlSum>(a, [&](auto formula) {
    using Formula = decltype(formula);
    const RowSum<T, Formula::kInputs, Formula> sum(a.grid, in, formula);
    FlooredResults<T> results(a, sum.units());
    sum.run(parallel, [&](int64_t unit, int64_t row, int n, const double* totals) {
      results.take_totals(unit, row, n, totals);
    });
    results.close();
  });
}

// row operands: grad, weights, rows. Gradients of mean and spread (, prior mean, prior spread).
template <Form F, bool kPrior>
struct KlSlope : KlFormula<F, kPrior> {
  static constexpr int kKept = 1;
  double row_floor = 0, factor = 1;

  template <class V>
  UNIGEN_INLINE void prepare(const V* operands, V* row) const {
    const V coefficient = operands[0] * operands[1] * constant<V>(factor);
    row[0] = select(operands[2] < constant<V>(row_floor), constant<V>(0), coefficient);
  }
  template <class V>
  UNIGEN_INLINE void operator()(const V* row, const V* in, V* out) const {
    const auto kl = this->at(in);
    V coefficient = row[0];
    if (this->dim_floor > -HUGE_VAL) {  // else the value is not computed
      coefficient = select(kl.value < constant<V>(this->dim_floor), constant<V>(0), coefficient);
    }
    out[0] = coefficient * kl.d_mean;
    out[1] = coefficient * kl.d_spread;
    if constexpr (kPrior) {
      out[2] = coefficient * kl.d_prior_mean;
      out[3] = coefficient * kl.d_prior_spread;
    }
  }
};

template <class T>
void gaussian_kl_backward_in(const GaussianKlBackward& a, const Parallel& parallel) {
  const Array row[3] = {arithmetic(a.grad, a), arithmetic(a.weights, a, 1), arithmetic(a.rows, a)};
  const Array in[4] = {elements(a.mean, a), elements(a.spread, a), elements(a.prior_mean, a), elements(a.prior_spread, a)};
  const Array out[4] = {elements(a.grad_mean, a), elements(a.grad_spread, a), elements(a.grad_prior_mean, a),
                        elements(a.grad_prior_spread, a)};
  with_formula<KlSlope>(a, [&](auto formula) {
    formula.row_floor = a.row_floor;
    formula.factor = a.reduction.scale / a.reduction.denominator;
    constexpr int kIn = decltype(formula)::kInputs;
    Map<T, 3, kIn, kIn, 2>(a.grid, row, in, out).run(parallel, formula);
  });
}

// ---- the reparameterised sample ------------------------------------------------------------------------------------

// Elements in logical order j, in chunks that do not leave a unit of work. Noise costs more than most: smaller units.
struct SampleLayout {
  int64_t samples, inner, cols, chunk;
  Partition partition;

  SampleLayout(const Grid& grid, int64_t samples, int64_t inner, int64_t most)
      : samples(samples),
        inner(samples == 1 ? grid.rows * grid.cols : inner),
        cols(grid.cols),
        chunk(most),
        partition(grid.rows, grid.cols, true, 1, 1, kUnit / 4) {
    // runs of noise are short: few enough elements for all of their samples to come from one window
    if (this->inner < 64) chunk = larger(1, smaller(chunk, most / larger(1, samples)));
  }

  int64_t total() const { return partition.rows * cols * samples; }

  // body(first, n) for the chunks of a unit
  template <class Body>
  UNIGEN_INLINE void chunks(int64_t unit, const Body& body) const {
    int64_t first = partition.row_begin(unit) * cols + partition.col_begin(unit);
    const int64_t end = (partition.row_end(unit) - 1) * cols + partition.col_end(unit);
    for (; first < end; first += chunk) body(first, int(smaller(chunk, end - first)));
  }

  // body(index in the chunk, index in z, n) for the runs of a sample that lie side by side in z
  template <class Body>
  UNIGEN_INLINE void runs(int64_t first, int n, int64_t sample, const Body& body) const {
    int64_t group = first / inner, within = first % inner;
    for (int done = 0; done < n; within = 0, ++group) {
      const int run = int(smaller(n - done, inner - within));
      body(done, (group * samples + sample) * inner + within, run);
      done += run;
    }
  }
};

template <class T, Form F>
void sample_gaussian_as(const SampleGaussian& a, const Parallel& parallel, const Options<F>& options) {
  using V = Vec<T>;
  const SampleLayout layout(a.grid, a.samples, a.inner, kChunk<T>);
  const Partition& partition = layout.partition;
  const Stream<T> mean(a.grid, elements(a.mean, a), Axis::none, Axis::rows_cols);
  const Stream<T> spread(a.grid, elements(a.spread, a), Axis::none, Axis::rows_cols);
  const Stream<T> kl(a.grid, arithmetic(a.kl, a), Axis::none, Axis::rows);
  Grid flat;
  flat.col_dims = 1;
  flat.cols = flat.col_size[0] = layout.total();
  Operand z_operand;
  z_operand.data = a.z;
  z_operand.col[0] = 1;
  const Stream<T> z(flat, elements(z_operand, a), Axis::none, Axis::cols);
  const bool with_kl = a.kl.data, split = partition.pieces > 1;
  double partial[kMaxUnits + kFewRows];

  partition.run(parallel, [&](int64_t unit) {
    alignas(kVectorBytes) T mean_room[kChunk<T>], spread_room[kChunk<T>], deviations[kChunk<T>], terms[kChunk<T>],
        z_room[kChunk<T>];
    Noise<T> noise(a.rng_state, layout.total());
    int64_t row = partition.row_begin(unit), left = partition.col_end(unit) - partition.col_begin(unit);
    double row_sum = 0;
    layout.chunks(unit, [&](int64_t first, int n) {
      const T* means = mean.read(0, first, n, mean_room);
      const T* spreads = spread.read(0, first, n, spread_room);
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        const V s = load(spreads + i, l);
        if (with_kl) store(terms + i, StandardKl<V>(load(means + i, l), s, options.get()).value);
        store(deviations + i, StandardDeviation<V>(s, options.get()).value);
      });
      for (int64_t sample = 0; sample < layout.samples; ++sample) {
        layout.runs(first, n, sample, [&](int at, int64_t index, int run) {
          const T* normals = noise.at(index, run);
          T* target = z.target(0, index, run, z_room);
          for_vectors<T>(run, [&](int i, auto l) UNIGEN_FORCED {
            store(target + i, load(means + at + i, l) + load(deviations + at + i, l) * load(normals + i, l), l);
          });
          z.written(0, index, run, target);
        });
      }
      // rows, or this unit's piece of one, end anywhere in a chunk
      for (int done = 0; with_kl && done < n;) {
        const int run = int(smaller(n - done, left));
        row_sum += sum_values(terms + done, run);
        done += run;
        left -= run;
        if (left) break;
        if (split) {
          partial[unit] = row_sum;
        } else {
          const T value = T(row_sum);
          kl.write(0, row++, 1, &value);
        }
        left = layout.cols;
        row_sum = 0;
      }
    });
  });
  if (!with_kl) return;
  for (int64_t r = 0; r < partition.rows && (split || layout.cols == 0); ++r) {
    double sum = 0;
    for (int64_t p = 0; split && p < partition.pieces; ++p) sum += partial[r * partition.pieces + p];
    const T value = T(sum);
    kl.write(0, r, 1, &value);
  }
}

template <class T, Form F>
void sample_gaussian_backward_as(const SampleGaussianBackward& a, const Parallel& parallel, const Options<F>& options) {
  using V = Vec<T>;
  const SampleLayout layout(a.grid, a.samples, a.inner, kChunk<T>);
  const Partition& partition = layout.partition;
  const auto stream = [&](const Array& array) { return Stream<T>(a.grid, array, Axis::none, Axis::rows_cols); };
  const Stream<T> mean = stream(elements(a.mean, a)), spread = stream(elements(a.spread, a)),
                  grad_kl = stream(arithmetic(a.grad_kl, a)), grad_z = stream(elements(a.grad_z, a)),
                  grad_mean = stream(elements(a.grad_mean, a)), grad_spread = stream(elements(a.grad_spread, a));
  const bool with_kl = a.grad_kl.data;

  partition.run(parallel, [&](int64_t unit) {
    // sums over the samples of grad_z and of grad_z · noise; then the gradients
    alignas(kVectorBytes) T plain_sums[kChunk<T>], noise_sums[kChunk<T>];
    alignas(kVectorBytes) T mean_room[kChunk<T>], spread_room[kChunk<T>], grad_room[kChunk<T>], kl_room[kChunk<T>];
    Noise<T> noise(a.rng_state, layout.total());
    layout.chunks(unit, [&](int64_t first, int n) {
      for (int i = 0; i < n; ++i) plain_sums[i] = noise_sums[i] = 0;
      for (int64_t sample = 0; a.grad_z.data && sample < layout.samples; ++sample) {
        const T* grads = grad_z.read(sample * a.grad_z_sample_stride, first, n, grad_room);
        layout.runs(first, n, sample, [&](int at, int64_t index, int run) {
          const T* normals = noise.at(index, run);
          for_vectors<T>(run, [&](int i, auto l) UNIGEN_FORCED {
            const V g = load(grads + at + i, l);
            store(plain_sums + at + i, load(plain_sums + at + i, l) + g, l);
            store(noise_sums + at + i, load(noise_sums + at + i, l) + g * load(normals + i, l), l);
          });
        });
      }
      const T* means = mean.read(0, first, n, mean_room);
      const T* spreads = spread.read(0, first, n, spread_room);
      const T* kl_grads = with_kl ? grad_kl.read(0, first, n, kl_room) : kl_room;
      T* mean_target = grad_mean.target(0, first, n, plain_sums);
      T* spread_target = grad_spread.target(0, first, n, noise_sums);
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        const V s = load(spreads + i, l);
        V d_mean = load(plain_sums + i);
        V d_spread = weighted(load(noise_sums + i), StandardDeviation<V>(s, options.get()).slope);
        if (with_kl) {
          const V g = load(kl_grads + i, l);
          const StandardKl<V> kl(load(means + i, l), s, options.get());
          d_mean = d_mean + weighted(g, kl.d_mean);
          d_spread = d_spread + weighted(g, kl.d_spread);
        }
        store(mean_target + i, d_mean, l);
        store(spread_target + i, d_spread, l);
      });
      grad_mean.written(0, first, n, mean_target);
      grad_spread.written(0, first, n, spread_target);
    });
  });
}

}  // namespace

void gaussian_kl(const GaussianKl& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { gaussian_kl_in<decltype(t)>(a, parallel); });
}
void gaussian_kl_backward(const GaussianKlBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { gaussian_kl_backward_in<decltype(t)>(a, parallel); });
}
void sample_gaussian(const SampleGaussian& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) {
    if (form_of(a.options) == Form::plain) return sample_gaussian_as<decltype(t)>(a, parallel, Options<Form::plain>{a.options});
    sample_gaussian_as<decltype(t)>(a, parallel, Options<Form::general>{a.options});
  });
}
void sample_gaussian_backward(const SampleGaussianBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) {
    if (form_of(a.options) == Form::plain) return sample_gaussian_backward_as<decltype(t)>(a, parallel, Options<Form::plain>{a.options});
    sample_gaussian_backward_as<decltype(t)>(a, parallel, Options<Form::general>{a.options});
  });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
