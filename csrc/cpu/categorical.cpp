// Kernels of categorical distributions and of the discretized logistic mixture. Lanes are sites.
#include "../formulas/categorical.h"

#include "sites.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// sums[k] += what body(offset in the tile, sums) adds for each of `count` numbers, in stretches that keep rounding small
template <class T, int kSums, class Body>
UNIGEN_INLINE void sum_numbers(int64_t count, Vec<T> (&sums)[kSums], const Body& body) {
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    const int64_t end = smaller(count, begin + kFlush);
    Vec<T> stretch[kSums];
    for (int k = 0; k < kSums; ++k) stretch[k] = Vec<T>(T(0));
    for (int64_t c = begin; c < end; ++c) body(c * Vec<T>::size, stretch);
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + stretch[k];
  }
}

// NaN loses: the sum of exponentials has it
template <class T>
UNIGEN_INLINE Vec<T> tile_maximum(const T* tile, int64_t count) {
  Vec<T> maximum = constant<Vec<T>>(-HUGE_VAL);
  for (int64_t c = 0; c < count; ++c) maximum = max(load(tile + c * Vec<T>::size), maximum);
  return maximum;
}

// ---- KL ------------------------------------------------------------------------------------------------------------

// log(q / p), and p times r log r - r + 1, r = q / p. With r = 1 + f near 1 the latter is f² + r (log r - f), of which
// nothing cancels: the terms of a class as kl_term has them, from the parts of the logarithm.
template <class T>
struct RatioTerms {
  Vec<T> ratio, log_ratio, kl;

  // p > 0, and q > 0 or NaN
  UNIGEN_INLINE RatioTerms(Vec<T> q, Vec<T> p) : ratio(q * reciprocal(p)) {
    using V = Vec<T>;
    const LogParts<T> parts(ratio);
    const V f = parts.f, correction = log_correction(f);
    log_ratio = log_from_parts(f, correction, parts.n) + ratio * constant<V>(0);
    const V near = p * (f * f + ratio * correction), far = q * log_ratio - (q - p);
    kl = select(parts.n == constant<V>(0), near, far);
  }
};

// A tile of sites: the exponentials that the softmaxes of q and p are made of, and of each class log(q / p).
template <class T, bool kPrior, bool kMixed>
class KlTile {
  using V = Vec<T>;

 public:
  template <class Arguments>
  explicit KlTile(const Arguments& a)
      : classes(a.classes),
        unimix(a.unimix),
        logits_q_(a, a.logits_q, a.classes),
        logits_p_(a, a.logits_p, a.classes),
        room_(4 * a.classes) {
    exp_q = room_.data();
    exp_p = exp_q + classes * V::size;
    log_ratio = exp_p + classes * V::size;
    ratio = log_ratio + classes * V::size;
  }

  // The KL of each site. With kKeep what the gradient needs of every class is left in the tiles, and `mean_log_ratio`,
  // `mean_ratio` under the softmaxes of q and p.
  template <bool kKeep>
  UNIGEN_INLINE V kl(int64_t first, int n) {
    const V zero = constant<V>(0);
    logits_q_.read(first, n, log_ratio);
    const V max_q = tile_maximum(log_ratio, classes);
    V max_p = zero, sums[2] = {zero, zero};
    if constexpr (kPrior) {
      logits_p_.read(first, n, exp_p);
      max_p = tile_maximum(exp_p, classes);
    }
    const LogitBases<V> base(max_q, max_p);
    sum_numbers<T>(classes, sums, [&](int64_t i, V* sum) UNIGEN_FORCED {
      const V a = load(log_ratio + i), e = exponential(a - max_q);
      store(exp_q + i, e);
      sum[0] = sum[0] + e;
      if constexpr (kPrior) {
        const V b = load(exp_p + i), f = exponential(b - max_p);
        store(exp_p + i, f);
        sum[1] = sum[1] + f;
        if constexpr (!kMixed) store(log_ratio + i, (a - base.q) - (b - base.p));
      }
    });
    const V one = constant<V>(1);
    inverse_q = one / sums[0];
    inverse_p = one / sums[1];
    const V keep = constant<V>(unimix.keep), keep_q = inverse_q * keep, keep_p = inverse_p * keep;
    const V floor = constant<V>(unimix.floor);
    const V uniform = constant<V>(1.0 / double(classes));
    // log(q / p) = logit of q (less that of p) - shift
    V shift = log(sums[0]) - (kPrior ? log(sums[1]) : constant<V>(::log(double(classes))));
    if constexpr (kPrior) shift = ((max_q - base.q) - (max_p - base.p)) + shift;

    V terms[3] = {zero, zero, zero};
    sum_numbers<T>(classes, terms, [&](int64_t i, V* sum) UNIGEN_FORCED {
      const V e = load(exp_q + i), f = kPrior ? load(exp_p + i) : zero;
      V d, r = zero;
      if constexpr (kMixed) {
        const RatioTerms<T> terms(e * keep_q + floor, kPrior ? f * keep_p + floor : uniform);
        d = terms.log_ratio;
        r = terms.ratio;
        sum[0] = sum[0] + terms.kl;
      } else {
        d = (kPrior ? load(log_ratio + i) : load(log_ratio + i) - max_q) - shift;
        sum[0] = sum[0] + kl_term(e * inverse_q, kPrior ? f * inverse_p : uniform, d);
      }
      if constexpr (kKeep) {
        store(log_ratio + i, d);
        sum[1] = sum[1] + (kMixed ? e * d : weighted(e, d));
        if constexpr (kPrior && kMixed) {
          store(ratio + i, r);
          sum[2] = sum[2] + f * r;
        }
      }
    });
    mean_log_ratio = terms[1] * inverse_q;
    mean_ratio = terms[2] * inverse_p;
    return terms[0];
  }

  const int64_t classes;
  const Unimix unimix;
  T *exp_q, *exp_p, *log_ratio, *ratio;
  V inverse_q, inverse_p, mean_log_ratio, mean_ratio;

 private:
  // Where all classes have a share of uniform ones, the last digit of a small one does not count.
  static UNIGEN_INLINE V exponential(V x) {
    if constexpr (kMixed) return exp2_bounded(x * constant<V>(1.44269504088896340736));
    else return exp_of_distance(x);
  }

  SiteStream<T> logits_q_, logits_p_;
  TileRoom<T> room_;
};

// calls body(prior, mixed), both constants
template <class Arguments, class Body>
UNIGEN_INLINE void with_form(const Arguments& a, const Body& body) {
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (a.unimix.mixed()) return a.logits_p.at.data ? body(yes, yes) : body(no, yes);
  return a.logits_p.at.data ? body(yes, no) : body(no, no);
}

template <class T, bool kPrior, bool kMixed>
struct KlValue {
  KlTile<T, kPrior, kMixed> tile;
  double floor;

  explicit KlValue(const CategoricalKl& a) : tile(a), floor(a.site_floor) {}

  UNIGEN_INLINE Vec<T> value(int64_t first, int n) {
    return maximum(tile.template kl<false>(first, n), constant<Vec<T>>(floor));
  }
};

template <class T>
void categorical_kl_in(const CategoricalKl& a, const Parallel& parallel) {
  const SiteSum<T> sum(a.grid, a.classes);
  FlooredResults<T> results(a, sum.units());
  with_form(a, [&](auto prior, auto mixed) {
    sum.run(
        parallel, [&] { return KlValue<T, prior.value, mixed.value>(a); },
        [&](int64_t unit, int64_t row, int n, const double* totals) { results.take_totals(unit, row, n, totals); });
  });
  results.close();
  if (!a.copy) return;
  const T value = *static_cast<const T*>(a.value.data);
  *static_cast<T*>(a.copy) = value;
  *static_cast<T*>(a.loss) = value * T(a.loss_scale);
}

template <class T, bool kPrior, bool kMixed>
void categorical_kl_backward_as(const CategoricalKlBackward& a, const Parallel& parallel) {
  using V = Vec<T>;
  const auto per_row = [&](const Operand& operand, double fill = 0) {
    return Stream<T>(a.grid, arithmetic(operand, a, fill), Axis::none, Axis::rows_cols);
  };
  const Stream<T> grad = per_row(a.grad), own_q = per_row(a.grad_own_q), own_p = per_row(a.grad_own_p),
                  weights = per_row(a.weights, 1), rows = per_row(a.rows);
  const SiteStream<T> grad_q(a, a.grad_q, a.classes), grad_p(a, a.grad_p, a.classes);
  const bool row_floor = a.row_floor > -HUGE_VAL;
  const Partition partition = site_partition<T>(a.grid, 2 * a.classes);
  partition.run(parallel, [&](int64_t u) {
    KlTile<T, kPrior, kMixed> tile(a);
    for_tiles<T>(partition, u, [&](int64_t first, int n) {
      alignas(kVectorBytes) T room[5][V::size] = {};
      const auto of_row = [&](const Stream<T>& stream, int k) {
        const T* source = stream.read(0, first, n, room[k]);
        return n == V::size ? load(source) : load(source, First<T>{n});
      };
      const V value = tile.template kl<true>(first, n);
      V share = of_row(weights, 0) * constant<V>(a.reduction.scale / a.reduction.denominator);
      if (row_floor) share = select(of_row(rows, 1) < constant<V>(a.row_floor), constant<V>(0), share);
      share = select(value < constant<V>(a.site_floor), constant<V>(0), share);
      const V common = of_row(grad, 2);
      const V keep = constant<V>(a.unimix.keep);
      const V by_q = weighted(share, (common * constant<V>(a.factor_q) + of_row(own_q, 3)) * keep);
      const V by_p = weighted(share, (common * constant<V>(a.factor_p) + of_row(own_p, 4)) * keep);
      const V scale_q = weighted(by_q, tile.inverse_q), scale_p = weighted(by_p, tile.inverse_p);
      const int64_t end = a.classes * V::size;
      if (kPrior && grad_p.present()) {
        for (int64_t i = 0; i < end; i += V::size) {
          const V f = load(tile.exp_p + i);
          V slope;
          if constexpr (kMixed) slope = weighted(scale_p, f * (tile.mean_ratio - load(tile.ratio + i)));
          else slope = weighted(by_p, f * tile.inverse_p - load(tile.exp_q + i) * tile.inverse_q);
          store(tile.exp_p + i, slope);
        }
        grad_p.write(first, n, tile.exp_p);
      }
      if (grad_q.present()) {
        for (int64_t i = 0; i < end; i += V::size) {
          const V slope = weighted(load(tile.exp_q + i), load(tile.log_ratio + i) - tile.mean_log_ratio);
          store(tile.exp_q + i, weighted(scale_q, slope));
        }
        grad_q.write(first, n, tile.exp_q);
      }
    });
  });
}

// ---- log-probabilities ---------------------------------------------------------------------------------------------

// own, others: exponentials of the class itself and of the others, relative to the largest
template <class T>
UNIGEN_INLINE Vec<T> chosen_log_prob(Vec<T> above, Vec<T> own, Vec<T> others) {
  using V = Vec<T>;
  const V total = others + (own - constant<V>(1));  // others + own >= 1, as the maximum is among them
  return above - select(total < constant<V>(HUGE_VAL), log1p(total), total);
}

// The class of each lane, its logit, and the sum of the others' exponentials apart from its own: neither log p nor 1 - p
// cancels where p is almost 1.
template <class T>
class ChosenTile {
  using V = Vec<T>;

 public:
  template <class Arguments>
  explicit ChosenTile(const Arguments& a)
      : classes(a.classes),
        logits_(a, a.logits, a.classes),
        ignore_index_(a.ignore_index),
        x_(static_cast<const int64_t*>(a.x.data)),
        sites_(strided(a.grid, a.x, Axis::rows_cols)),
        room_(a.classes) {
    tile = room_.data();
  }

  // leaves the exponentials in the tile, that of the class itself being 0
  UNIGEN_INLINE void read(int64_t first, int n) {
    logits_.read(first, n, tile);
    const V maximum = tile_maximum(tile, classes);
    alignas(kVectorBytes) T logits[V::size], of_label[V::size];
    for (int l = 0; l < V::size; ++l) {
      const int64_t x = l < n ? x_[sites_.offset(first + l)] : 0;
      of_label[l] = x != ignore_index_;
      place[l] = 0 <= x && x < classes ? x * V::size + l : -1;
      logits[l] = T(NAN);  // there is no such class
      if (place[l] < 0) continue;
      logits[l] = tile[place[l]];
      tile[place[l]] = -T(HUGE_VAL);
    }
    counts = load(of_label);
    above = load(logits) - maximum;
    own = exp(above);
    V sums[1] = {constant<V>(0)};
    sum_numbers<T>(classes, sums, [&](int64_t i, V* sum) UNIGEN_FORCED {
      const V e = exp_of_distance(load(tile + i) - maximum);
      store(tile + i, e);
      sum[0] = sum[0] + e;
    });
    others = sums[0];
  }

  UNIGEN_INLINE V value(int64_t first, int n) {
    read(first, n);
    return weighted(counts, chosen_log_prob(above, own, others));
  }

  const int64_t classes;
  T* tile;
  int64_t place[V::size];
  V above, own, others, counts;  // counts: 1, or 0 for a label that is ignored

 private:
  SiteStream<T> logits_;
  const int64_t ignore_index_;
  const int64_t* x_;
  Strided sites_;
  TileRoom<T> room_;
};

// The same where classes are adjacent and many: lanes are classes. A group of sites at a time: the maxima of all, then the
// exponentials, so that none waits for the maximum of its own row.
template <class T>
class ChosenRows {
  using V = Vec<T>;
  static constexpr int64_t kGroup = 16384 / sizeof(T);  // numbers that the nearest cache has room for

 public:
  template <class Arguments>
  explicit ChosenRows(const Arguments& a)
      : classes(a.classes),
        group(int(larger(1, smaller(V::size, kGroup / a.classes)))),
        logits_(a, a.logits, a.classes),
        ignore_index_(a.ignore_index),
        x_(static_cast<const int64_t*>(a.x.data)),
        sites_(strided(a.grid, a.x, Axis::rows_cols)),
        stride_(round_up(a.classes, V::size)),
        room_(group * stride_ / V::size) {}

  T* exponentials(int l) { return room_.data() + l * stride_; }

  // n <= group sites. With kKeep their exponentials are left, that of the class itself being 0. counts: 1, or 0 for a label
  // that is ignored.
  template <bool kKeep>
  UNIGEN_INLINE void read(int64_t first, int n, T* above, T* others, T* counts) {
    alignas(kVectorBytes) T maxima[V::size];
    for (int l = 0; l < n; ++l) {
      T* const row = exponentials(l);
      const T* const logits = logits_.read_site(first + l, row);
      V top(T(-HUGE_VAL));
      for_vectors<T>(int(classes), [&](int i, auto lanes) UNIGEN_FORCED {
        const V x = load(logits + i, lanes);
        top = keep(lanes, max(x, top), top);
        store(row + i, x, lanes);
        __builtin_prefetch(logits + group * classes + i);
      });
      maxima[l] = lane_max(top);
      const int64_t x = x_[sites_.offset(first + l)];
      counts[l] = x != ignore_index_;
      place[l] = x < classes ? x : -1;
      above[l] = x < 0 || x >= classes ? T(NAN) : logits[x] - maxima[l];  // NaN: there is no such class
    }
    for (int l = 0; l < n; ++l)
      if (place[l] >= 0) exponentials(l)[place[l]] = T(-HUGE_VAL);
    for (int l = 0; l < n; ++l) {
      T* const row = exponentials(l);
      const V maximum(maxima[l]);
      double total = 0;
      for (int64_t begin = 0; begin < classes; begin += kFlush * V::size) {
        V sum(T(0));
        for_vectors<T>(int(smaller(kFlush * V::size, classes - begin)), [&](int i, auto lanes) UNIGEN_FORCED {
          const V e = exp_of_distance(load(row + begin + i, lanes) - maximum);
          if constexpr (kKeep) store(row + begin + i, e, lanes);
          sum = keep(lanes, sum + e, sum);
        });
        total += lane_sum(sum);
      }
      others[l] = T(total);
    }
  }

  UNIGEN_INLINE V value(int64_t first, int n) {
    alignas(kVectorBytes) T above[V::size] = {}, others[V::size] = {}, counts[V::size] = {};
    for (int l = 0; l < n; l += group) read<false>(first + l, int(smaller(group, n - l)), above + l, others + l, counts + l);
    return weighted(load(counts), chosen_log_prob(load(above), exp(load(above)), load(others)));
  }

  const int64_t classes;
  const int group;
  int64_t place[V::size];

 private:
  SiteStream<T> logits_;
  const int64_t ignore_index_;
  const int64_t* x_;
  Strided sites_;
  int64_t stride_;
  TileRoom<T> room_;
};

template <class T>
void categorical_log_prob_in(const CategoricalLogProb& a, const Parallel& parallel) {
  const SiteSum<T> sum(a.grid, a.classes);
  RowResults<T> results(a.grid, arithmetic(a.value, a), {}, sum.units());
  const auto finish = [&](int64_t unit, int64_t row, int n, const double* totals) {
    results.take_totals(unit, row, n, totals);
  };
  if (SiteStream<T>(a, a.logits, a.classes).long_sites()) {
    sum.run(parallel, [&] { return ChosenRows<T>(a); }, finish);
  } else {
    sum.run(parallel, [&] { return ChosenTile<T>(a); }, finish);
  }
}

template <class T>
void categorical_log_prob_backward_in(const CategoricalLogProbBackward& a, const Parallel& parallel) {
  using V = Vec<T>;
  const Stream<T> grad(a.grid, arithmetic(a.grad, a), Axis::none, Axis::rows_cols);
  const SiteStream<T> grad_logits(a, a.grad_logits, a.classes);
  const Partition partition = site_partition<T>(a.grid, a.classes);
  if (grad_logits.long_sites() && SiteStream<T>(a, a.logits, a.classes).long_sites()) {
    return partition.run(parallel, [&](int64_t u) {
      ChosenRows<T> chosen(a);
      for_tiles<T>(partition, u, [&](int64_t first, int n) {
        alignas(kVectorBytes) T room[V::size], above[V::size] = {}, others[V::size] = {}, counts[V::size], shares[V::size];
        const T* g = grad.read(0, first, n, room);
        for (int done = 0; done < n; done += chosen.group) {
          const int count = int(smaller(chosen.group, n - done));
          chosen.template read<true>(first + done, count, above, others, counts);
          store(shares, constant<V>(1) / (load(others) + exp(load(above))));
          for (int l = 0; l < count; ++l) {
            T* const e = chosen.exponentials(l);
            T* const target = grad_logits.target_site(first + done + l, e);
            if (counts[l] == 0 || g[done + l] == 0) {
              for (int64_t i = 0; i < a.classes; ++i) target[i] = 0;
              grad_logits.written_site(first + done + l, target);
              continue;
            }
            const T share = g[done + l] * shares[l];
            for_vectors<T>(int(a.classes), [&](int i, auto lanes) UNIGEN_FORCED {
              store(target + i, V(-share) * load(e + i, lanes), lanes);
            });
            if (chosen.place[l] >= 0) target[chosen.place[l]] = share * others[l];
            grad_logits.written_site(first + done + l, target);
          }
        }
      });
    });
  }
  partition.run(parallel, [&](int64_t u) {
    ChosenTile<T> chosen(a);
    for_tiles<T>(partition, u, [&](int64_t first, int n) {
      alignas(kVectorBytes) T room[V::size] = {}, own[V::size];
      const T* source = grad.read(0, first, n, room);
      const V g = n == V::size ? load(source) : load(source, First<T>{n});
      chosen.read(first, n);
      const V zero = constant<V>(0);
      const V given = g * chosen.counts, share = select(given == zero, zero, given / (chosen.others + chosen.own));
      for (int64_t i = 0; i < a.classes * V::size; i += V::size)
        store(chosen.tile + i, weighted(-share, load(chosen.tile + i)));
      store(own, weighted(share, chosen.others));
      for (int l = 0; l < n; ++l)
        if (chosen.place[l] >= 0) chosen.tile[chosen.place[l]] = own[l];
      grad_logits.write(first, n, chosen.tile);
    });
  });
}

// ---- the discretized logistic mixture ------------------------------------------------------------------------------

template <class T, int C>
class MixtureTile {
  using V = Vec<T>;

 public:
  using Component = LogisticComponent<C, V>;
  static constexpr int kNumbers = 1 + Component::kNumbers;  // of a component

  template <class Arguments>
  explicit MixtureTile(const Arguments& a)
      : mixtures(a.mixtures),
        params_(a, a.params, a.mixtures * kNumbers),
        x_(a, a.x, C),
        room_(a.mixtures * (kNumbers + 1) + C) {
    params = room_.data();
    joint = params + mixtures * kNumbers * V::size;
    data_ = joint + mixtures * V::size;
  }

  // where number k of component m is
  UNIGEN_INLINE T* number(int64_t m, int k) const { return params + (mixtures * (1 + k) + m) * V::size; }
  UNIGEN_INLINE T* logit(int64_t m) const { return params + m * V::size; }

  // log of the mixture. With kKeep the derivatives of each component stand in place of its numbers, and `joint` keeps its
  // share of the total, with the sum `joint_sum` of those.
  template <bool kKeep>
  UNIGEN_INLINE V log_prob(int64_t first, int n) {
    params_.read(first, n, params);
    x_.read(first, n, data_);
    for (int c = 0; c < C; ++c) x[c] = load(data_ + c * V::size);
    for (int64_t m = 0; m < mixtures; ++m) {
      V numbers[Component::kNumbers];
      for (int k = 0; k < Component::kNumbers; ++k) numbers[k] = load(number(m, k));
      const Component component(x, numbers);
      store(joint + m * V::size, load(logit(m)) + component.value);
      if constexpr (kKeep) {
        for (int k = 0; k < Component::kNumbers; ++k) store(number(m, k), component.d_number[k]);
      }
    }
    const V max_logit = tile_maximum(params, mixtures), max_joint = finite_shift(tile_maximum(joint, mixtures));
    V sums[2] = {constant<V>(0), constant<V>(0)};
    sum_numbers<T>(mixtures, sums, [&](int64_t i, V* sum) UNIGEN_FORCED {
      const V e = exp_of_distance(load(params + i) - max_logit), f = exp_of_distance(load(joint + i) - max_joint);
      if constexpr (kKeep) {
        store(params + i, e);
        store(joint + i, f);
      }
      sum[0] = sum[0] + e;
      sum[1] = sum[1] + f;
    });
    prior_sum = sums[0];
    joint_sum = sums[1];
    return (max_joint - max_logit) + (log(joint_sum) - log(prior_sum));
  }

  UNIGEN_INLINE V value(int64_t first, int n) { return log_prob<false>(first, n); }

  const int64_t mixtures;
  T *params, *joint;
  V x[C], prior_sum, joint_sum;

 private:
  SiteStream<T> params_, x_;
  T* data_;
  TileRoom<T> room_;
};

template <class Arguments, class Body>
UNIGEN_INLINE void with_channels(const Arguments& a, const Body& body) {
  if (a.channels == 3) return body(std::integral_constant<int, 3>());
  body(std::integral_constant<int, 1>());
}

template <class T>
void logistic_mixture_in(const LogisticMixture& a, const Parallel& parallel) {
  const SiteSum<T> sum(a.grid, 16 * a.mixtures * a.channels);
  RowResults<T> results(a.grid, arithmetic(a.value, a), {}, sum.units());
  with_channels(a, [&](auto channels) {
    sum.run(
        parallel, [&] { return MixtureTile<T, channels.value>(a); },
        [&](int64_t unit, int64_t row, int n, const double* totals) { results.take_totals(unit, row, n, totals); });
  });
}

template <class T, int C>
void logistic_mixture_backward_as(const LogisticMixtureBackward& a, const Parallel& parallel) {
  using V = Vec<T>;
  using Tile = MixtureTile<T, C>;
  using Component = typename Tile::Component;
  const Stream<T> grad(a.grid, arithmetic(a.grad, a), Axis::none, Axis::rows_cols);
  const SiteStream<T> params(a, a.params, a.mixtures * Tile::kNumbers);
  const SiteStream<T> grad_params(a, a.grad_params, a.mixtures * Tile::kNumbers), grad_x(a, a.grad_x, C);
  const Partition partition = site_partition<T>(a.grid, 16 * a.mixtures * C);
  partition.run(parallel, [&](int64_t u) {
    Tile tile(a);
    // the coefficients, which the tile has put its derivatives in place of
    TileRoom<T> given(grad_x.present() ? a.mixtures * Tile::kNumbers : 0);
    for_tiles<T>(partition, u, [&](int64_t first, int n) {
      alignas(kVectorBytes) T room[V::size] = {}, of_x[C * V::size];
      const T* source = grad.read(0, first, n, room);
      const V g = n == V::size ? load(source) : load(source, First<T>{n});
      tile.template log_prob<true>(first, n);
      const V zero = constant<V>(0), coefficient = select(tile.joint_sum == zero, zero, g);  // impossible: no gradient
      const V by_prior = select(coefficient == zero, zero, coefficient / tile.prior_sum);
      const V by_joint = select(coefficient == zero, zero, coefficient / tile.joint_sum);
      V by_x[C];
      for (int c = 0; c < C; ++c) by_x[c] = zero;
      if (C == 3 && grad_x.present()) params.read(first, n, given.data());
      for (int64_t m = 0; m < a.mixtures; ++m) {
        const V share = weighted(by_joint, load(tile.joint + m * V::size));
        store(tile.logit(m), share - weighted(by_prior, load(tile.logit(m))));
        V slopes[Component::kNumbers];
        for (int k = 0; k < Component::kNumbers; ++k) {
          slopes[k] = weighted(share, load(tile.number(m, k)));
          store(tile.number(m, k), slopes[k]);
        }
        if (!grad_x.present()) continue;
        for (int c = 0; c < C; ++c) by_x[c] = by_x[c] - slopes[c * Component::kPerChannel];
        if constexpr (C == 3) {
          const T* coefficients = given.data() + m * V::size;
          const auto tanh = [&](int k) { return Tanh<V>(load(coefficients + a.mixtures * (1 + k) * V::size)).value; };
          by_x[0] = by_x[0] + weighted(slopes[3], tanh(2)) + weighted(slopes[6], tanh(5));
          by_x[1] = by_x[1] + weighted(slopes[6], tanh(8));
        }
      }
      if (grad_params.present()) grad_params.write(first, n, tile.params);
      if (!grad_x.present()) return;
      for (int c = 0; c < C; ++c) store(of_x + c * V::size, by_x[c]);
      grad_x.write(first, n, of_x);
    });
  });
}

}  // namespace

void categorical_kl(const CategoricalKl& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { categorical_kl_in<decltype(t)>(a, parallel); });
}
void categorical_kl_backward(const CategoricalKlBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) {
    with_form(a, [&](auto prior, auto mixed) {
      categorical_kl_backward_as<decltype(t), prior.value, mixed.value>(a, parallel);
    });
  });
}
void categorical_log_prob(const CategoricalLogProb& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { categorical_log_prob_in<decltype(t)>(a, parallel); });
}
void categorical_log_prob_backward(const CategoricalLogProbBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { categorical_log_prob_backward_in<decltype(t)>(a, parallel); });
}
void logistic_mixture(const LogisticMixture& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) { logistic_mixture_in<decltype(t)>(a, parallel); });
}
void logistic_mixture_backward(const LogisticMixtureBackward& a, const Parallel& parallel) {
  with_arithmetic(a.dtype, [&](auto t) {
    with_channels(a, [&](auto channels) { logistic_mixture_backward_as<decltype(t), channels.value>(a, parallel); });
  });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
