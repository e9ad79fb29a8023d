// The bound of several samples per example: from what the decoder gave to log-weights, from these to the loss and the
// coefficients of the gradients, and back over the same numbers, which an example's first reading has left in the cache.
#include "objectives.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// ---- over the latent -------------------------------------------------------------------------------------------------

// log p(z) - log q(z) of all samples of an example: what depends on the example alone is computed once for them.
template <class T>
class Latent {
  using V = Vec<T>;
  enum { kMean, kLogvar, kPriorMean, kPriorLogvar, kOfExample };

 public:
  explicit Latent(const BoundTensors& a) : cols_(a.latent.cols), samples_(a.samples) {
    const Operand* of_example[kOfExample] = {&a.mean, &a.logvar, &a.prior_mean, &a.prior_logvar};
    const Operand* grads[kOfExample] = {&a.grad_mean, &a.grad_logvar, &a.grad_prior_mean, &a.grad_prior_logvar};
    const auto stream = [&](const Operand& operand) {
      return Stream<T>(a.latent, {operand, a.latent_dtype}, Axis::rows, Axis::cols);
    };
    z_ = stream(a.z);
    grad_z_ = stream(a.grad_z);
    wants_z_ = a.grad_z.data;
    for (int k = 0; k < kOfExample; ++k) {
      of_example_[k] = stream(*of_example[k]);
      grads_[k] = stream(*grads[k]);
      wants_ = wants_ || grads[k]->data;
    }
  }

  bool any() const { return wants_ || wants_z_; }

  // adds them to values[0 … samples)
  UNIGEN_NOINLINE void add(int64_t example, double* values) const {
    Room room;
    for (int64_t c = 0; c < cols_; c += kChunk<T>) {
      const int n = int(smaller(kChunk<T>, cols_ - c));
      const double of_example = prepare(example, c, n, room);
      for (int64_t first = 0; first < samples_; first += kTogether) {
        const int m = int(smaller(kTogether, samples_ - first));
        const T* z[kTogether];
        V sum[kTogether];
        for (int k = 0; k < m; ++k) {
          z[k] = z_.read(z_.origin(example * samples_ + first + k), c, n, room.z[k]);
          sum[k] = V(T(0));
        }
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          const OfExample shared(room, i);
          for (int k = 0; k < m; ++k) sum[k] = keep(l, sum[k] + shared.terms(load(z[k] + i, l)).value(), sum[k]);
        });
        for (int k = 0; k < m; ++k) values[first + k] += of_example + lane_sum(sum[k]);
      }
    }
  }

  UNIGEN_NOINLINE void gradients(int64_t example, const T* coefficients) const {
    Room room;
    alignas(kVectorBytes) T sums[kOfExample][kChunk<T>], target_room[kTogether][kChunk<T>];
    alignas(kVectorBytes) double totals[kOfExample][kChunk<T>];
    for (int64_t c = 0; c < cols_; c += kChunk<T>) {
      const int n = int(smaller(kChunk<T>, cols_ - c)), padded = int(round_up(n, V::size));
      prepare(example, c, n, room);
      for (int g = 0; g < kOfExample; ++g) {
        for (int i = 0; i < padded; ++i) totals[g][i] = 0;
      }
      for (int64_t block = 0; block < samples_; block += kFlush) {
        for (int g = 0; g < kOfExample; ++g) {
          for (int i = 0; i < padded; ++i) sums[g][i] = 0;
        }
        const int64_t end = smaller(samples_, block + kFlush);
        for (int64_t first = block; first < end; first += kTogether) {
          const int m = int(smaller(kTogether, end - first));
          const int64_t row = example * samples_ + first;
          const T* z[kTogether];
          T* target[kTogether];
          int64_t origin[kTogether];
          for (int k = 0; k < m; ++k) {
            z[k] = z_.read(z_.origin(row + k), c, n, room.z[k]);
            origin[k] = wants_z_ ? grad_z_.origin(row + k) : 0;
            target[k] = wants_z_ ? grad_z_.target(origin[k], c, n, target_room[k]) : target_room[k];
          }
          for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
            const OfExample shared(room, i);
            V sum[kOfExample];
            for (int g = 0; g < kOfExample; ++g) sum[g] = load(sums[g] + i);
            for (int k = 0; k < m; ++k) {
              if (coefficients[first + k] == 0) {  // and the slopes may be infinite
                store(target[k] + i, V(T(0)), l);
                continue;
              }
              const V factor(coefficients[first + k]);
              const LatentTerms<V> t = shared.terms(load(z[k] + i, l));
              store(target[k] + i, factor * t.of_z(), l);
              const V slopes[kOfExample] = {t.of_mean(), t.of_logvar(), t.of_prior_mean(), t.of_prior_logvar()};
              for (int g = 0; g < kOfExample; ++g) sum[g] = sum[g] + factor * slopes[g];
            }
            for (int g = 0; g < kOfExample; ++g) store(sums[g] + i, sum[g]);
          });
          for (int k = 0; wants_z_ && k < m; ++k) grad_z_.written(origin[k], c, n, target[k]);
        }
        for (int g = 0; wants_ && g < kOfExample; ++g) {
          for (int i = 0; i < padded; i += V::size) add_lanes(totals[g] + i, load(sums[g] + i));
        }
      }
      for (int g = 0; wants_ && g < kOfExample; ++g) {
        for (int i = 0; i < n; ++i) sums[g][i] = T(totals[g][i]);
        grads_[g].write(grads_[g].origin(example * samples_), c, n, sums[g]);
      }
    }
  }

 private:
  static constexpr int kTogether = 8;  // samples for each of which what they share is not read again

  struct Room {
    alignas(kVectorBytes) T z[kTogether][kChunk<T>], mean[kChunk<T>], rate[kChunk<T>], prior_mean[kChunk<T>],
        prior_rate[kChunk<T>];
  };

  // of an element of the latent
  struct OfExample {
    V mean, rate, prior_mean, prior_rate;

    UNIGEN_INLINE OfExample(const Room& room, int i)
        : mean(load(room.mean + i)),
          rate(load(room.rate + i)),
          prior_mean(load(room.prior_mean + i)),
          prior_rate(load(room.prior_rate + i)) {}

    UNIGEN_INLINE LatentTerms<V> terms(V z) const { return {z, mean, rate, prior_mean, prior_rate}; }
  };

  // What the samples share; returns the sum of half (v_q - v_p). Lanes beyond the last element are there, as zeros.
  double prepare(int64_t example, int64_t first, int n, Room& room) const {
    alignas(kVectorBytes) T stage[kOfExample][kChunk<T>];
    const T* source[kOfExample];
    for (int k = 0; k < kOfExample; ++k) {
      source[k] = of_example_[k].read(of_example_[k].origin(example * samples_), first, n, stage[k]);
    }
    V sum(T(0));
    for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
      const V logvar = load(source[kLogvar] + i, l), prior_logvar = load(source[kPriorLogvar] + i, l);
      store(room.mean + i, load(source[kMean] + i, l));
      store(room.rate + i, Standardized<V>::rate_of(logvar));
      store(room.prior_mean + i, load(source[kPriorMean] + i, l));
      store(room.prior_rate + i, Standardized<V>::rate_of(prior_logvar));
      sum = keep(l, sum + constant<V>(0.5) * (logvar - prior_logvar), sum);
    });
    return lane_sum(sum);
  }

  int64_t cols_, samples_;
  bool wants_z_ = false, wants_ = false;
  Stream<T> z_, grad_z_, of_example_[kOfExample], grads_[kOfExample];
};

// ---- over the samples ------------------------------------------------------------------------------------------------

// The estimator of one example's log-weights.
template <class T>
class Samples {
  using V = Vec<T>;

 public:
  struct Found {
    double bound = 0, ess = 0;
  };

  explicit Samples(const BoundTensors& a)
      : count_(a.samples / a.groups),
        groups_(a.groups),
        bound_{{double(count_)}, {a.power}, a.elbo_weight},
        slope_{{a.reduction.scale / a.reduction.denominator / double(a.groups)}, {a.power}, a.elbo_weight, double(count_)} {}

  // log-weights of an example, relative to the one of the largest weight in its group; returns the mean of those
  double relate(const double* log_w, T* relative) const {
    double mean = 0;
    for (int64_t first = 0; first < count_ * groups_; first += count_) {
      double shift = log_w[first];
      for (int64_t k = first; k < first + count_; ++k) {
        if (bound_.power.power < 0 ? log_w[k] < shift : shift < log_w[k]) shift = log_w[k];
      }
      shift = finite_shift(shift);
      for (int64_t k = first; k < first + count_; ++k) relative[k] = T(log_w[k] - shift);
      mean += shift / double(groups_);
    }
    return mean;
  }

  // Means over the groups, the bound less that of `relate`; coefficients, if wanted, of the gradients of grad · loss.
  UNIGEN_NOINLINE Found weigh(const T* relative, T grad, T* coefficients) const {
    Found mean;
    for (int64_t g = 0; g < groups_; ++g) {
      const T* own = relative + g * count_;
      V kept[PowerBound::kKept];
      open(own, kept);
      double squares = 0, sums[PowerBound::kSums] = {};
      stretches([&](int64_t first, int n) {
        V sum[PowerBound::kSums], square(T(0));
        for (V& s : sum) s = V(T(0));
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          const V x = load(own + first + i, l);
          V t[PowerBound::kSums];
          bound_.terms(0, kept, &x, t);
          for (int s = 0; s < PowerBound::kSums; ++s) sum[s] = keep(l, sum[s] + t[s], sum[s]);
          square = keep(l, square + t[0] * t[0], square);
        });
        for (int s = 0; s < PowerBound::kSums; ++s) sums[s] += lane_sum(sum[s]);
        squares += lane_sum(square);
      });
      V totals[PowerBound::kSums], value;
      for (int s = 0; s < PowerBound::kSums; ++s) totals[s] = V(T(sums[s]));
      bound_.close(0, totals, kept, static_cast<V*>(nullptr));
      bound_.values(kept, &value);
      mean.bound += double(value.v[0]) / double(groups_);
      mean.ess += effective_samples(double(kept[1].v[0]), squares) / double(groups_);
      if (!coefficients) continue;
      if (grad == 0) {
        for (int64_t k = 0; k < count_; ++k) coefficients[g * count_ + k] = 0;
        continue;
      }
      const V operands[3] = {V(grad), kept[0], kept[1]};
      V row[PowerSlope::kKept];
      slope_.prepare(operands, row);
      stretches([&](int64_t first, int n) {
        for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
          const V x = load(own + first + i, l);
          V y;
          slope_(row, &x, &y);
          store(coefficients + g * count_ + first + i, y, l);
        });
      });
    }
    return mean;
  }

 private:
  // body(first, n) for the pieces of a group
  template <class Body>
  UNIGEN_INLINE void stretches(const Body& body) const {
    for (int64_t first = 0; first < count_; first += kChunk<T>) body(first, int(smaller(kChunk<T>, count_ - first)));
  }

  void open(const T* relative, V* kept) const {
    const V lowest = constant<V>(-HUGE_VAL);
    V largest = lowest;
    stretches([&](int64_t first, int n) {
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        const V x = load(relative + first + i, l);
        largest = max(keep(l, bound_.key(&x), lowest), largest);
      });
    });
    bound_.open(V(lane_max(largest)), lowest, kept);
  }

  int64_t count_, groups_;
  PowerBound bound_;
  PowerSlope slope_;
};

// ---- the two kernels ---------------------------------------------------------------------------------------------------

template <class T, class F>
class Bound : Examples<T, F> {
  using Base = Examples<T, F>;
  using Base::samples_, Base::count_, Base::cols_, Base::few_, Base::density_, Base::parallel_;

 public:
  // numbers of an example's samples
  struct Room {
    std::vector<double> sums;
    std::vector<T> numbers;

    explicit Room(int64_t samples) : sums(samples), numbers(samples) {}
  };

  Bound(const BoundTensors& a, const F& formula, const Parallel& parallel)
      : Base(a, a.samples, formula, parallel),
        latent_(a),
        estimator_(a),
        log_w_(a.grid, arithmetic(a.log_w, a), Axis::none, Axis::rows),
        residual_(a.grid, arithmetic(a.residual, a), Axis::none, Axis::rows) {}

  // take(unit, example, found), units in order within an example's; returns how many units there are
  template <class Take>
  int64_t forward(bool gradients, const Take& take) const {
    const bool keep = gradients && density_.keeps();
    if (!few_) {
      return of_each(gradients, [&](int64_t unit, int64_t example, Room& room, T* coefficients, T* const* totals) {
        for (int64_t k = 0; k < samples_; ++k) room.sums[k] = density_.value(example * samples_ + k, 0, cols_, keep);
        weigh(unit, example, room, gradients ? coefficients : nullptr, take);
        if (gradients) pull_back_example(example, coefficients, keep, totals);
      });
    }
    const std::vector<double> sums = this->by_piece(
        [&](int64_t row, int64_t begin, int64_t end) { return density_.value(row, begin, end, keep); });
    Room room(samples_);
    std::vector<T> coefficients(count_ * samples_);
    for (int64_t example = 0; example < count_; ++example) {
      for (int64_t k = 0; k < samples_; ++k) room.sums[k] = sums[example * samples_ + k];
      weigh(0, example, room, gradients ? coefficients.data() + example * samples_ : nullptr, take);
    }
    if (gradients) pull_back_all(coefficients.data(), keep);
    return 1;
  }

  // of(example, room, coefficients): fills in the latter
  template <class Coefficients>
  void backward(const Coefficients& of) const {
    if (!few_) {
      of_each(true, [&](int64_t, int64_t example, Room& room, T* coefficients, T* const* totals) {
        of(example, room, coefficients);
        pull_back_example(example, coefficients, false, totals);
      });
      return;
    }
    Room room(samples_);
    std::vector<T> coefficients(count_ * samples_);
    for (int64_t b = 0; b < count_; ++b) of(b, room, coefficients.data() + b * samples_);
    pull_back_all(coefficients.data(), false);
  }

  // coefficients of grad · loss, given log_w
  void reweigh(int64_t example, T grad, Room& room, T* coefficients) const {
    T* const numbers = room.numbers.data();
    for (double& sum : room.sums) sum = 0;
    for (const Stream<T>* stream : {&log_w_, &residual_}) {
      const T* part = stream->read(0, example * samples_, samples_, numbers);
      for (int64_t k = 0; k < samples_; ++k) room.sums[k] += double(part[k]);
    }
    estimator_.relate(room.sums.data(), numbers);
    estimator_.weigh(numbers, grad, coefficients);
  }

 private:
  template <class Take>
  void weigh(int64_t unit, int64_t example, Room& room, T* coefficients, const Take& take) const {
    double* const sums = room.sums.data();
    T* const numbers = room.numbers.data();
    latent_.add(example, sums);
    for (int64_t k = 0; k < samples_; ++k) numbers[k] = T(sums[k]);
    log_w_.write(0, example * samples_, samples_, numbers);
    for (int64_t k = 0; k < samples_; ++k)
      numbers[k] = __builtin_isfinite(sums[k]) ? T(sums[k] - double(numbers[k])) : T(0);
    residual_.write(0, example * samples_, samples_, numbers);
    const double shift = estimator_.relate(sums, numbers);
    auto found = estimator_.weigh(numbers, T(1), coefficients);
    found.bound += shift;
    take(unit, example, found);
  }

  void pull_back_example(int64_t example, const T* coefficients, bool kept, T* const* totals) const {
    for (int64_t k = 0; density_.any() && k < samples_; ++k) {
      const int64_t row = example * samples_ + k;
      if (kept) {
        density_.scale(row, coefficients[k]);
      } else {
        density_.gradients(row, 0, cols_, coefficients[k], totals);
      }
    }
    if (latent_.any()) latent_.gradients(example, coefficients);
  }

  void pull_back_all(const T* coefficients, bool kept) const {
    this->pull_back(coefficients, kept);
    if (latent_.any()) {
      Partition::each(parallel_, count_, [&](int64_t b) { latent_.gradients(b, coefficients + b * samples_); });
    }
  }

  // work(unit, example, room, room for coefficients, sums of shared gradients)
  template <class Work>
  int64_t of_each(bool gradients, const Work& work) const {
    return this->by_example(gradients, [&](int64_t unit, int64_t begin, int64_t end, T* const* totals) {
      Room room(samples_);
      std::vector<T> coefficients(samples_);
      for (int64_t b = begin; b < end; ++b) work(unit, b, room, coefficients.data(), totals);
    });
  }

  Latent<T> latent_;
  Samples<T> estimator_;
  Stream<T> log_w_, residual_;
};

template <class T, class F>
void sampled_bound_of(const SampledBound& a, const F& formula, const Parallel& parallel) {
  const Bound<T, F> bound(a, formula, parallel);
  const auto of_examples = [&](const Operand& operand) {
    return Stream<T>(a.grid, arithmetic(operand, a), Axis::none, Axis::rows);
  };
  const Stream<T> bounds = of_examples(a.bound), ess = of_examples(a.ess), values = of_examples(a.value);
  double partial[kMaxUnits + kFewRows] = {};
  const int64_t units =
      bound.forward(a.gradients, [&](int64_t unit, int64_t example, const typename Samples<T>::Found& found) {
        const T results[3] = {T(found.bound), T(found.ess), T(found.bound * a.reduction.scale)};
        const int64_t row = example * a.samples;
        bounds.write(0, row, 1, results);
        ess.write(0, row, 1, results + 1);
        if (!a.reduction.reduce) values.write(0, row, 1, results + 2);
        partial[unit] += found.bound;
      });
  close_reduction<T>(a.value, a.reduction, partial, units);
}

template <class T, class F>
void sampled_bound_backward_of(const SampledBoundBackward& a, const F& formula, const Parallel& parallel) {
  const Bound<T, F> bound(a, formula, parallel);
  const Stream<T> grad_log_w(a.grid, arithmetic(a.grad_log_w, a), Axis::none, Axis::rows);
  const Stream<T> grad_value(a.grid, arithmetic(a.grad_value, a), Axis::rows, Axis::none);
  bound.backward([&](int64_t example, auto& room, T* coefficients) {
    const int64_t first = example * a.samples;
    bound.reweigh(example, grad_value.value(first), room, coefficients);
    const T* own = grad_log_w.read(0, first, a.samples, room.numbers.data());
    for (int64_t k = 0; k < a.samples; ++k) coefficients[k] += own[k];
  });
}

}  // namespace

void sampled_bound(const SampledBound& a, const Parallel& parallel) {
  with_density(a, [&](auto t, auto formula) { sampled_bound_of<decltype(t)>(a, formula, parallel); });
}
void sampled_bound_backward(const SampledBoundBackward& a, const Parallel& parallel) {
  with_density(a, [&](auto t, auto formula) { sampled_bound_backward_of<decltype(t)>(a, formula, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
