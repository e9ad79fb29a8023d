// Kernels of discriminator logits: sums of an elementwise term, the term itself, and gradients.
#include "../formulas/adversarial.h"

#include "../formulas/importance.h"
#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// The term is a run-time choice: a branch per vector, always the same one, is cheaper than twenty copies of every loop; but
// not where the term costs no more than the branch.
struct AnyTerm {
  Term term;
  UNIGEN_INLINE Term get() const { return term; }
};
template <Term kTerm>
struct OneTerm {
  UNIGEN_INLINE static constexpr Term get() { return kTerm; }
};
template <class Body>
void with_term(int number, const Body& body) {
  switch (Term(number)) {
    case Term::hinge_real: return body(OneTerm<Term::hinge_real>());
    case Term::hinge_fake: return body(OneTerm<Term::hinge_fake>());
    case Term::linear: return body(OneTerm<Term::linear>());
    case Term::identity: return body(OneTerm<Term::identity>());
    case Term::least_squares_real: return body(OneTerm<Term::least_squares_real>());
    case Term::least_squares_fake: return body(OneTerm<Term::least_squares_fake>());
    default: return body(AnyTerm{Term(number)});
  }
}

// 1 where `x` is on the side of the edge that the term wants
template <class V>
UNIGEN_INLINE V on_right_side(Term term, V x, V edge) {
  const V zero = constant<V>(0), one = constant<V>(1);
  return select(wants_positive(term) ? edge < x : x < edge, one, zero);
}

template <class Choice>
struct Value {
  Choice term;

  template <class V>
  UNIGEN_INLINE V operator()(V x, V*) const {
    return term_value(term.get(), x);
  }
};

// others: on the right side, logit, probability
struct ValueAndStatistics {
  Term term;

  template <class V>
  UNIGEN_INLINE V operator()(V x, V* others) const {
    others[0] = on_right_side(term, x, constant<V>(boundary(term)));
    others[1] = x;
    others[2] = Logistic<V>(x).sigmoid();
    return term_value(term, x);
  }
};

UNIGEN_INLINE double numel(const LogitItem& item) { return double(item.grid.rows * item.grid.cols); }

struct GridAndArray {
  const Grid& first;
  Array second;
};

// flat_sums of any number of items
template <class T, int kOthers, class With, class Done>
void sum_items(const LogitLoss& a, const Parallel& parallel, const With& with, const Done& done) {
  for (int64_t begin = 0; begin < a.num_items; begin += Flats::kMost) {
    const LogitItem* items = a.items + begin;
    flat_sums<T, kOthers>(
        parallel, int(smaller(Flats::kMost, a.num_items - begin)),
        [&](int i) { return GridAndArray{items[i].grid, {items[i].logits, a.dtype}}; },
        [&](int i, const auto& run) { with(begin + i, run); },
        [&](int i, double sum, const double* others) { done(begin + i, sum, others); });
  }
}

template <class T>
void logit_loss_in(const LogitLoss& a, const Parallel& parallel) {
  double total = 0;
  if (!a.statistics) {
    sum_items<T, 0>(
        a, parallel,
        [&](int64_t i, const auto& run) {
          with_term(a.items[i].term, [&](auto term) { run(Value<decltype(term)>{term}); });
        },
        [&](int64_t i, double sum, const double*) { total += sum / a.items[i].count; });
  } else {
    sum_items<T, 3>(
        a, parallel, [&](int64_t i, const auto& run) { run(ValueAndStatistics{Term(a.items[i].term)}); },
        [&](int64_t i, double sum, const double* others) {
          total += sum / a.items[i].count;
          T* statistics = static_cast<T*>(a.statistics) + 4 * i;
          statistics[0] = T(sum / numel(a.items[i]));
          for (int k = 0; k < 3; ++k) statistics[k + 1] = T(others[k] / numel(a.items[i]));
        });
  }
  *static_cast<T*>(a.value) = T(a.scale * total);
}

// the gradient of each item, in one region: with(i, run) calls run(its function object)
template <class T, class With>
void map_items(const LogitLossBackward& a, const Parallel& parallel, const With& with) {
  for (int64_t begin = 0; begin < a.num_items; begin += Flats::kMost) {
    const LogitItem* items = a.items + begin;
    const Flats flats(T(), int(smaller(Flats::kMost, a.num_items - begin)),
                      [&](int i) { return items[i].grid.rows * items[i].grid.cols; });
    flats.run(parallel, [&](int64_t, int i, int64_t from, int64_t to) {
      const Array in = {items[i].logits, a.dtype}, out = {items[i].grad_logits, a.dtype};
      const Map<T, 0, 1, 1> map(items[i].grid, nullptr, &in, &out);
      with(begin + i, [&](const auto& f) { map.span(f, from, to); });
    });
  }
}

// of an incoming gradient of 0
template <class T>
struct NoSlope {
  static constexpr int kKept = 0;
  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>*, Vec<T>* out) const { out[0] = Vec<T>(T(0)); }
};

template <class T, class Choice>
struct ScaledSlope {
  static constexpr int kKept = 0;
  Choice term;
  T factor;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = term_slope(term.get(), in[0]) * Vec<T>(factor);
  }
};

template <class T>
void logit_loss_backward_in(const LogitLossBackward& a, const Parallel& parallel) {
  const T grad = *static_cast<const T*>(a.grad);
  map_items<T>(a, parallel, [&](int64_t i, const auto& run) {
    const T factor = grad * T(a.scale / a.items[i].count);
    if (factor == 0) return run(NoSlope<T>());
    with_term(a.items[i].term, [&](auto term) { run(ScaledSlope<T, decltype(term)>{term, factor}); });
  });
}

// ---- coupled logits --------------------------------------------------------------------------------------------------

struct Logit {
  template <class V>
  UNIGEN_INLINE V operator()(V x, V*) const {
    return x;
  }
};

// others: slope; with kStatistics on the right side, logit and probability as well
template <class T, bool kStatistics>
struct CoupledValue {
  static constexpr int kOthers = kStatistics ? 4 : 1;
  Coupling coupling;
  Term term;
  T summary, inverse;

  template <class V>
  UNIGEN_INLINE V operator()(V x, V* others) const {
    const Coupled<V> coupled(coupling, x, V(summary), V(inverse));
    if (kStatistics) {
      const V judged = coupling == Coupling::averages ? coupled.logit : x;
      others[1] = on_right_side(term, judged, constant<V>(0));
      others[2] = x;
      others[3] = Logistic<V>(judged).sigmoid();
    }
    others[0] = coupling == Coupling::averages ? term_slope(term, coupled.logit) : constant<V>(0);
    return term_value(term, coupled.logit);
  }
};

// each item's mean logit, or what its ratios take, to its place in the statistics
template <class T>
void summarize(const CoupledLogitLoss& a, const Parallel& parallel) {
  T* statistics = static_cast<T*>(a.statistics);
  const auto summary = [&](int64_t i) -> T& { return statistics[kCoupledColumns * i + 4]; };
  if (Coupling(a.coupling) == Coupling::averages) {
    return sum_items<T, 0>(
        a, parallel, [](int64_t, const auto& run) { run(Logit()); },
        [&](int64_t i, double sum, const double*) { summary(i) = T(sum / numel(a.items[i])); });
  }
  for (int64_t i = 0; i < a.num_items; ++i) {
    T* own = &summary(i);
    own[0] = own[1] = 0;  // all -inf: the ratios are 0, not NaN
    if (i < a.reals) continue;
    const RowExponentials<T, NoExtra> exponentials(a.items[i].grid, {a.items[i].logits, a.dtype}, 1);
    exponentials.run(parallel, [&](int64_t, int64_t, int, const T* shift, const double* sum, const double*) {
      own[0] = shift[0];
      own[1] = T(inverse_sum(sum[0]) * numel(a.items[i]));
    });
  }
}

template <class T, bool kStatistics>
void coupled_terms(const CoupledLogitLoss& a, const Parallel& parallel) {
  using F = CoupledValue<T, kStatistics>;
  double total = 0;
  T* statistics = static_cast<T*>(a.statistics);
  sum_items<T, F::kOthers>(
      a, parallel,
      [&](int64_t i, const auto& run) {
        const T* of = statistics + kCoupledColumns * coupled_with(a.coupling, i, a.reals);
        run(F{coupling_of(a.coupling, i, a.reals), Term(a.items[i].term), of[4], of[5]});
      },
      [&](int64_t i, double sum, const double* others) {
        total += sum / a.items[i].count;
        T* own = statistics + kCoupledColumns * i;
        own[0] = T(sum / numel(a.items[i]));
        for (int k = 1; k < 4; ++k) own[k] = kStatistics ? T(others[k % F::kOthers] / numel(a.items[i])) : T(0);
        if (Coupling(a.coupling) == Coupling::averages) own[5] = T(others[0] / numel(a.items[i]));
      });
  *static_cast<T*>(a.value) = T(a.scale * total);
}

template <class T>
void coupled_logit_loss_in(const CoupledLogitLoss& a, const Parallel& parallel) {
  summarize<T>(a, parallel);
  if (a.return_stats) {
    coupled_terms<T, true>(a, parallel);
  } else {
    coupled_terms<T, false>(a, parallel);
  }
}

template <class T>
struct CoupledSlope {
  static constexpr int kKept = 0;
  Coupling coupling;
  Term term;
  T summary, inverse, factor, through_mean;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    using V = Vec<T>;
    const Coupled<V> coupled(coupling, in[0], V(summary), V(inverse));
    const V slope = term_slope(term, coupled.logit) * V(factor);
    if (coupling == Coupling::ratios) {
      out[0] = select(coupled.slope == constant<V>(0), constant<V>(0), slope * coupled.slope);
    } else {
      out[0] = slope - V(through_mean);
    }
  }
};

template <class T>
void coupled_logit_loss_backward_in(const CoupledLogitLossBackward& a, const Parallel& parallel) {
  const T* statistics = static_cast<const T*>(a.statistics);
  const double grad = double(*static_cast<const T*>(a.grad)) * a.scale;
  map_items<T>(a, parallel, [&](int64_t i, const auto& run) {
    if (grad == 0) return run(NoSlope<T>());
    const int64_t with = coupled_with(a.coupling, i, a.reals);
    const LogitItem &item = a.items[i], &other = a.items[with];
    const T* of = statistics + kCoupledColumns * with;
    const double through = grad * double(of[5]) * (numel(other) / other.count) / numel(item);
    const bool averages = Coupling(a.coupling) == Coupling::averages;
    run(CoupledSlope<T>{coupling_of(a.coupling, i, a.reals), Term(item.term), of[4], of[5], T(grad / item.count),
                        averages ? T(through) : T(0)});
  });
}

// ---- groups ------------------------------------------------------------------------------------------------------------

// Numbers of the groups, in the order of their first samples: an open table of twice as many places as samples.
class GroupTable {
 public:
  GroupTable(int64_t* places, int64_t* labels, int64_t samples) : places_(places), labels_(labels) {
    while ((int64_t(1) << bits_) < 2 * samples) ++bits_;
    for (int64_t p = 0; p < (int64_t(1) << bits_); ++p) places_[p] = -1;
  }

  UNIGEN_INLINE int64_t group_of(int64_t label) {
    const int64_t last = (int64_t(1) << bits_) - 1;
    int64_t place = int64_t((uint64_t(label) * 0x9E3779B97F4A7C15u) >> (64 - bits_));
    while (places_[place] >= 0) {
      if (labels_[places_[place]] == label) return places_[place];
      place = (place + 1) & last;
    }
    labels_[count_] = label;
    return places_[place] = count_++;
  }

  int64_t count() const { return count_; }

 private:
  int64_t *places_, *labels_;
  int64_t count_ = 0;
  int bits_ = 1;
};

// On one thread: a minibatch of labelled samples is small, and each is touched three times.
template <class T>
void grouped_weights_in(const GroupedWeights& a) {
  using V = Vec<T>;
  const int64_t n = a.grid.cols;
  int64_t* places = static_cast<int64_t*>(a.workspace);  // of at most 4n + 2
  int64_t *labels = places + 4 * n + 2, *group = labels + n;
  double *sum = reinterpret_cast<double*>(group + n), *loss = sum + n;
  T *peak = reinterpret_cast<T*>(loss + n), *weights = static_cast<T*>(a.statistics), *losses = weights + n;
  GroupTable table(places, labels, n);
  const Stream<T> logits(a.grid, elements(a.logits, a), Axis::none, Axis::rows_cols);
  const int64_t* label = static_cast<const int64_t*>(a.labels.data);
  const int64_t step = a.grid.col_dims ? a.labels.col[a.grid.col_dims - 1] : 0;
  const V temperature = V(T(a.temperature));
  alignas(kVectorBytes) T room[kChunk<T>], scaled[kChunk<T>], terms[kChunk<T>];
  for (int64_t first = 0; first < n; first += kChunk<T>) {
    const int some = int(smaller(kChunk<T>, n - first));
    const T* l = logits.read(0, first, some, room);
    for_vectors<T>(some, [&](int i, auto lanes) UNIGEN_FORCED { store(scaled + i, load(l + i, lanes) / temperature); });
    for (int i = 0; i < some; ++i) {
      const int64_t before = table.count(), g = table.group_of(label[(first + i) * step]);
      if (g == before) {
        peak[g] = -T(HUGE_VAL);
        sum[g] = loss[g] = 0;
      }
      group[first + i] = g;
      if (peak[g] < scaled[i]) peak[g] = scaled[i];  // NaN stays out: the sums carry it
    }
  }
  for (int64_t first = 0; first < n; first += kChunk<T>) {
    const int some = int(smaller(kChunk<T>, n - first));
    const T* l = logits.read(0, first, some, room);
    for (int i = 0; i < some; ++i) scaled[i] = peak[group[first + i]];
    for_vectors<T>(some, [&](int i, auto lanes) UNIGEN_FORCED {
      const V x = load(l + i, lanes), e = exp_of_distance(x / temperature - finite_shift(load(scaled + i, lanes)));
      store(weights + first + i, e, lanes);
      store(terms + i, weighted(e, softplus(-x)), lanes);
    });
    for (int i = 0; i < some; ++i) {
      sum[group[first + i]] += double(weights[first + i]);
      loss[group[first + i]] += double(terms[i]);
    }
  }
  double total = 0;
  for (int64_t g = 0; g < table.count(); ++g) {
    sum[g] = inverse_sum(sum[g]);
    loss[g] *= sum[g];
    total += loss[g];
  }
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = T(double(weights[i]) * sum[group[i]]);
    losses[i] = T(loss[group[i]]);
  }
  const double factor = a.mean ? 1 / double(table.count()) : 1;
  losses[n] = T(factor);
  *static_cast<T*>(a.value) = T(n == 0 && a.mean ? double(NAN) : total * factor);
}

// in: logits, weights, losses
template <class T>
struct GroupedSlope {
  static constexpr int kKept = 0;
  bool detach;
  T inverse_temperature, factor;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = iwgan_slope(in[0], in[1], detach, in[2], Vec<T>(inverse_temperature)) * Vec<T>(factor);
  }
};

template <class T>
void grouped_weights_backward_in(const GroupedWeightsBackward& a, const Parallel& parallel) {
  const Array in[3] = {elements(a.logits, a), arithmetic(a.weights, a), arithmetic(a.losses, a)};
  const Array out = elements(a.grad_logits, a);
  const T factor = *static_cast<const T*>(a.grad) * *static_cast<const T*>(a.factor);
  const Map<T, 0, 3, 1> map(a.grid, nullptr, in, &out);
  if (factor == 0) return map.run(parallel, NoSlope<T>());
  map.run(parallel, GroupedSlope<T>{a.detach, T(1 / a.temperature), factor});
}

// ---- elementwise -------------------------------------------------------------------------------------------------------

template <class T>
struct ScaledTerm {
  static constexpr int kKept = 0;
  Term term;
  T scale;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = term_value(term, in[0]) * Vec<T>(scale);
  }
};

template <class T>
void logit_term_in(const LogitTerm& a, const Parallel& parallel) {
  const Array in = elements(a.logits, a), out = arithmetic(a.out, a);
  Map<T, 0, 1, 1>(a.grid, nullptr, &in, &out).run(parallel, ScaledTerm<T>{Term(a.term), T(a.scale)});
}

// in: logits, grad
template <class T>
struct ScaledTermSlope {
  static constexpr int kKept = 0;
  Term term;
  T scale;

  UNIGEN_INLINE void operator()(const Vec<T>*, const Vec<T>* in, Vec<T>* out) const {
    out[0] = weighted(in[1] * Vec<T>(scale), term_slope(term, in[0]));
  }
};

template <class T>
void logit_term_backward_in(const LogitTermBackward& a, const Parallel& parallel) {
  const Array in[2] = {elements(a.logits, a), arithmetic(a.grad, a)}, out = elements(a.grad_logits, a);
  Map<T, 0, 2, 1>(a.grid, nullptr, in, &out).run(parallel, ScaledTermSlope<T>{Term(a.term), T(a.scale)});
}

}  // namespace

void logit_loss(const LogitLoss& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_loss_in<decltype(t)>(a, parallel); });
}
void logit_loss_backward(const LogitLossBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_loss_backward_in<decltype(t)>(a, parallel); });
}
void coupled_logit_loss(const CoupledLogitLoss& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { coupled_logit_loss_in<decltype(t)>(a, parallel); });
}
void coupled_logit_loss_backward(const CoupledLogitLossBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { coupled_logit_loss_backward_in<decltype(t)>(a, parallel); });
}
void grouped_weights(const GroupedWeights& a, const Parallel&) {
  with_arithmetic(a.dtype, [&](auto t) { grouped_weights_in<decltype(t)>(a); });
}
void grouped_weights_backward(const GroupedWeightsBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { grouped_weights_backward_in<decltype(t)>(a, parallel); });
}
void logit_term(const LogitTerm& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_term_in<decltype(t)>(a, parallel); });
}
void logit_term_backward(const LogitTermBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logit_term_backward_in<decltype(t)>(a, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
