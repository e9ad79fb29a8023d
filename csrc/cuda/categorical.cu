// Categorical distributions and the discretized logistic mixture. The lanes of a site share its classes, or components.
#include "../formulas/categorical.h"

#include "sites.cuh"

namespace unigen::cuda {
namespace {

struct SiteOp {
  static constexpr bool kReduces = false;
  static constexpr int kOfLane = 4;  // numbers of a site for each of its lanes, up to a warp
};

// What a site's lanes read again and again is in the nearest cache, if not in registers.
template <class T, class Body>
UNIGEN_DEVICE void for_numbers(int64_t count, const SiteGroup& group, const Body& body) {
  for (int64_t c = group.lane; c < count; c += group.lanes) body(c);
}

// ---- KL ------------------------------------------------------------------------------------------------------------

// a site's softmax of logits: exp(logit - maximum) · inverse
template <class T>
struct Softmax {
  T maximum, sum, inverse;

  template <class E>
  static UNIGEN_DEVICE Softmax of(const SiteAt& at, const SiteGroup& group, const Vectors& logits, int64_t classes) {
    Softmax s;
    s.maximum = T(-HUGE_VAL);
    for_numbers<T>(classes, group, [&](int64_t c) { s.maximum = larger(s.maximum, at.number<E, T>(logits, c)); });
    s.maximum = group.reduce(s.maximum, Maximum());
    s.sum = 0;
    for_numbers<T>(classes, group, [&](int64_t c) { s.sum += exp(at.number<E, T>(logits, c) - s.maximum); });
    s.sum = group.reduce(s.sum, Plus());
    s.inverse = T(1) / s.sum;
    return s;
  }

  UNIGEN_DEVICE T at(T logit) const { return exp(logit - maximum) * inverse; }
};

template <class T>
struct KlSite {
  Softmax<T> q, p;
  T base_q, base_p, shift, kl;  // log(q / p) = (logit of q - base_q) - (logit of p - base_p) - shift
};

template <class T>
struct KlClass {
  T sigma_q, sigma_p, ratio, log_ratio, term;  // ratio with unimix only
};

template <class Element, class Arguments, bool kPrior, bool kMixed>
struct KlOp : Arguments, SiteOp {
  using E = Element;
  using T = Arithmetic<E>;
  using Site = KlSite<T>;

  explicit KlOp(const Arguments& a) : Arguments(a) {}

  UNIGEN_DEVICE KlClass<T> at_class(const SiteAt& at, const Site& s, int64_t c) const {
    KlClass<T> k;
    const T a = at.number<E, T>(this->logits_q, c), b = kPrior ? at.number<E, T>(this->logits_p, c) : T(0);
    k.sigma_q = s.q.at(a);
    k.sigma_p = kPrior ? s.p.at(b) : T(1) / T(this->classes);
    T q = k.sigma_q, p = k.sigma_p;
    k.ratio = 0;
    if constexpr (kMixed) {
      q = this->unimix(k.sigma_q);
      if (kPrior) p = this->unimix(k.sigma_p);
      k.ratio = q / p;
      k.log_ratio = log(k.ratio);
    } else {
      k.log_ratio = (kPrior ? (a - s.base_q) - (b - s.base_p) : a - s.q.maximum) - s.shift;
    }
    k.term = kl_term(q, p, k.log_ratio);
    return k;
  }

  UNIGEN_DEVICE Site site(const SiteAt& at, const SiteGroup& group) const {
    Site s;
    s.q = Softmax<T>::template of<E>(at, group, this->logits_q, this->classes);
    if constexpr (kPrior) s.p = Softmax<T>::template of<E>(at, group, this->logits_p, this->classes);
    s.shift = log(s.q.sum) - log(kPrior ? s.p.sum : T(this->classes));
    if constexpr (kPrior) {
      const LogitBases<T> base(s.q.maximum, s.p.maximum);
      s.base_q = base.q;
      s.base_p = base.p;
      s.shift = ((s.q.maximum - base.q) - (s.p.maximum - base.p)) + s.shift;
    }
    T kl = 0;
    for_numbers<T>(this->classes, group, [&](int64_t c) { kl += at_class(at, s, c).term; });
    s.kl = group.reduce(kl, Plus());
    return s;
  }
};

template <class Element, bool kPrior, bool kMixed>
struct KlValueOp : KlOp<Element, CategoricalKl, kPrior, kMixed> {
  using T = Arithmetic<Element>;
  using KlOp<Element, CategoricalKl, kPrior, kMixed>::KlOp;
  static constexpr bool kReduces = true;

  UNIGEN_DEVICE double value(const KlSite<T>& s) const { return double(maximum(s.kl, T(this->site_floor))); }

  UNIGEN_DEVICE double finish(const Rows& at, double sum) const {
    T v = T(sum);
    if (this->rows.data) at.template at<T>(this->rows, 0) = v;
    v = maximum(v, T(this->row_floor));
    if (this->weights.data) v = weighted(at.template at<T>(this->weights, 0), v);
    if (!this->reduction.reduce) at.template at<T>(this->CategoricalKl::value, 0) = v * T(this->reduction.scale);
    return double(v);
  }

  UNIGEN_DEVICE void total(double sum) const {
    const T v = T(sum * this->reduction.scale / this->reduction.denominator);
    *static_cast<T*>(this->CategoricalKl::value.data) = v;
    if (this->copy == nullptr) return;
    *static_cast<T*>(this->copy) = v;
    *static_cast<T*>(this->loss) = v * T(this->loss_scale);
  }
};

template <class Element, bool kPrior, bool kMixed>
struct KlBackwardOp : KlOp<Element, CategoricalKlBackward, kPrior, kMixed> {
  using E = Element;
  using T = Arithmetic<E>;
  using KlOp<Element, CategoricalKlBackward, kPrior, kMixed>::KlOp;

  UNIGEN_DEVICE void write(const SiteAt& at, const SiteGroup& group, const KlSite<T>& s) const {
    T mean_log_ratio = 0, mean_ratio = 0;
    for_numbers<T>(this->classes, group, [&](int64_t c) {
      const KlClass<T> k = this->at_class(at, s, c);
      mean_log_ratio += weighted(k.sigma_q, k.log_ratio);
      mean_ratio += k.sigma_p * k.ratio;
    });
    mean_log_ratio = group.reduce(mean_log_ratio, Plus());
    mean_ratio = group.reduce(mean_ratio, Plus());
    if (!at.live) return;

    const Rows& row = at.rows;
    T share = T(this->unimix.keep * this->reduction.scale / this->reduction.denominator);
    if (this->weights.data) share *= row.template at<T>(this->weights, 0);
    if (this->rows.data && row.template at<T>(this->rows, 0) < T(this->row_floor)) share = 0;
    if (s.kl < T(this->site_floor)) share = 0;
    const T common = row.template at<T>(this->grad, 0);
    T by_q = common * T(this->factor_q), by_p = common * T(this->factor_p);
    if (this->grad_own_q.data) by_q += row.template at<T>(this->grad_own_q, 0);
    if (this->grad_own_p.data) by_p += row.template at<T>(this->grad_own_p, 0);
    by_q = weighted(share, by_q);
    by_p = weighted(share, by_p);
    for_numbers<T>(this->classes, group, [&](int64_t c) {
      const KlClass<T> k = this->at_class(at, s, c);
      if (this->grad_q.at.data) at.store<E>(this->grad_q, c, weighted(by_q, weighted(k.sigma_q, k.log_ratio - mean_log_ratio)));
      if (kPrior && this->grad_p.at.data)
        at.store<E>(this->grad_p, c, weighted(by_p, kMixed ? k.sigma_p * (mean_ratio - k.ratio) : k.sigma_p - k.sigma_q));
    });
  }
};

template <template <class, bool, bool> class Op, class Arguments>
const char* run_kl(const Arguments& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) {
    using E = decltype(e);
    const bool prior = a.logits_p.at.data;
    if (a.unimix.mixed())
      return prior ? run_sites(Op<E, true, true>(a), a.classes, launch) : run_sites(Op<E, false, true>(a), a.classes, launch);
    return prior ? run_sites(Op<E, true, false>(a), a.classes, launch) : run_sites(Op<E, false, false>(a), a.classes, launch);
  });
}

// ---- log-probabilities ---------------------------------------------------------------------------------------------

// The class chosen, and the sum of the others' exponentials apart from its own.
template <class T>
struct ChosenSite {
  int64_t x;  // -1: there is no such class
  bool counts;  // whether the label is not ignored
  T maximum, above, own, others;
};

template <class Element, class Arguments>
struct ChosenOp : Arguments, SiteOp {
  using E = Element;
  using T = Arithmetic<E>;
  using Site = ChosenSite<T>;

  explicit ChosenOp(const Arguments& a) : Arguments(a) {}

  UNIGEN_DEVICE Site site(const SiteAt& at, const SiteGroup& group) const {
    Site s;
    s.x = static_cast<const int64_t*>(this->x.data)[at.offset(this->x)];
    s.counts = s.x != this->ignore_index;
    if (s.x < 0 || s.x >= this->classes) s.x = -1;
    s.maximum = T(-HUGE_VAL);
    for_numbers<T>(this->classes, group, [&](int64_t c) { s.maximum = larger(s.maximum, at.number<E, T>(this->logits, c)); });
    s.maximum = group.reduce(s.maximum, Maximum());
    T others = 0;
    for_numbers<T>(this->classes, group, [&](int64_t c) {
      if (c != s.x) others += exp(at.number<E, T>(this->logits, c) - s.maximum);
    });
    s.others = group.reduce(others, Plus());
    s.above = s.x < 0 ? T(NAN) : at.number<E, T>(this->logits, s.x) - s.maximum;
    s.own = exp(s.above);
    return s;
  }
};

template <class Element>
struct LogProbOp : ChosenOp<Element, CategoricalLogProb> {
  using T = Arithmetic<Element>;
  using ChosenOp<Element, CategoricalLogProb>::ChosenOp;
  static constexpr bool kReduces = true;
  static constexpr Reduction reduction = {};

  UNIGEN_DEVICE double value(const ChosenSite<T>& s) const {
    return s.counts ? double(s.above - log1p(s.others + (s.own - T(1)))) : 0;
  }
  UNIGEN_DEVICE double finish(const Rows& at, double sum) const {
    at.template at<T>(this->CategoricalLogProb::value, 0) = T(sum);
    return sum;
  }
  UNIGEN_DEVICE void total(double) const {}
};

template <class Element>
struct LogProbBackwardOp : ChosenOp<Element, CategoricalLogProbBackward> {
  using E = Element;
  using T = Arithmetic<E>;
  using ChosenOp<Element, CategoricalLogProbBackward>::ChosenOp;

  UNIGEN_DEVICE void write(const SiteAt& at, const SiteGroup& group, const ChosenSite<T>& s) const {
    if (!at.live) return;
    const T given = s.counts ? at.rows.template at<T>(this->grad, 0) : T(0);
    const T share = given == 0 ? T(0) : given / (s.others + s.own);
    for_numbers<T>(this->classes, group, [&](int64_t c) {
      const T slope = c == s.x ? s.others : -exp(at.number<E, T>(this->logits, c) - s.maximum);
      at.store<E>(this->grad_logits, c, weighted(share, slope));
    });
  }
};

// ---- the discretized logistic mixture ------------------------------------------------------------------------------

template <class T, int C>
struct MixtureSite {
  T x[C], max_logit, max_joint, prior_sum, joint_sum;
};

template <class Element, class Arguments, int C>
struct MixtureOp : Arguments, SiteOp {
  using E = Element;
  using T = Arithmetic<E>;
  using Site = MixtureSite<T, C>;
  using Component = LogisticComponent<C, T>;
  static constexpr int kOfLane = 1;

  explicit MixtureOp(const Arguments& a) : Arguments(a) {}

  UNIGEN_DEVICE Component component(const SiteAt& at, const Site& s, int64_t m) const {
    T numbers[Component::kNumbers];
#pragma unroll
    for (int k = 0; k < Component::kNumbers; ++k) numbers[k] = at.number<E, T>(this->params, this->mixtures * (1 + k) + m);
    return Component(s.x, numbers);
  }

  // the sums keep up with the maxima: a component is long, and best taken once
  UNIGEN_DEVICE Site site(const SiteAt& at, const SiteGroup& group) const {
    Site s;
#pragma unroll
    for (int c = 0; c < C; ++c) s.x[c] = at.number<E, T>(this->Arguments::x, c);
    T max_logit = T(-HUGE_VAL), max_joint = max_logit, prior_sum = 0, joint_sum = 0;
    const auto absorb = [](T value, T& highest, T& sum) {
      const T next = larger(highest, value);
      sum = (highest == T(-HUGE_VAL) ? T(0) : sum * exp(highest - next)) + (value == T(-HUGE_VAL) ? T(0) : exp(value - next));
      highest = next;
    };
    for_numbers<T>(this->mixtures, group, [&](int64_t m) {
      const T logit = at.number<E, T>(this->params, m);
      absorb(logit, max_logit, prior_sum);
      absorb(logit + component(at, s, m).value, max_joint, joint_sum);
    });
    s.max_logit = group.reduce(max_logit, Maximum());
    s.max_joint = group.reduce(max_joint, Maximum());
    const auto joined = [&](T highest, T sum, T overall) {
      return group.reduce(highest == T(-HUGE_VAL) ? sum : sum * exp(highest - overall), Plus());
    };
    s.prior_sum = joined(max_logit, prior_sum, s.max_logit);
    s.joint_sum = joined(max_joint, joint_sum, s.max_joint);
    return s;
  }
};

template <class Element, int C>
struct MixtureValueOp : MixtureOp<Element, LogisticMixture, C> {
  using T = Arithmetic<Element>;
  using MixtureOp<Element, LogisticMixture, C>::MixtureOp;
  static constexpr bool kReduces = true;
  static constexpr Reduction reduction = {};

  UNIGEN_DEVICE double value(const MixtureSite<T, C>& s) const {
    return double((s.max_joint - s.max_logit) + (log(s.joint_sum) - log(s.prior_sum)));
  }
  UNIGEN_DEVICE double finish(const Rows& at, double sum) const {
    at.template at<T>(this->LogisticMixture::value, 0) = T(sum);
    return sum;
  }
  UNIGEN_DEVICE void total(double) const {}
};

template <class Element, int C>
struct MixtureBackwardOp : MixtureOp<Element, LogisticMixtureBackward, C> {
  using E = Element;
  using T = Arithmetic<E>;
  using MixtureOp<Element, LogisticMixtureBackward, C>::MixtureOp;
  using Component = LogisticComponent<C, T>;

  UNIGEN_DEVICE void write(const SiteAt& at, const SiteGroup& group, const MixtureSite<T, C>& s) const {
    const T g = s.joint_sum == 0 ? T(0) : at.rows.template at<T>(this->grad, 0);  // impossible: no gradient
    const T by_prior = g == 0 ? T(0) : g / s.prior_sum, by_joint = g == 0 ? T(0) : g / s.joint_sum;
    T by_x[C] = {};
    for_numbers<T>(this->mixtures, group, [&](int64_t m) {
      const Component component = this->component(at, s, m);
      const T logit = at.number<E, T>(this->params, m);
      const T share = weighted(by_joint, exp(logit + component.value - s.max_joint));
#pragma unroll
      for (int c = 0; c < C; ++c) by_x[c] += weighted(share, component.d_x[c]);
      if (!this->grad_params.at.data) return;
      at.store<E>(this->grad_params, m, share - weighted(by_prior, exp(logit - s.max_logit)));
#pragma unroll
      for (int k = 0; k < Component::kNumbers; ++k)
        at.store<E>(this->grad_params, this->mixtures * (1 + k) + m, weighted(share, component.d_number[k]));
    });
    if (!this->grad_x.at.data) return;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const T sum = group.reduce(by_x[c], Plus());
      if (group.lane == 0) at.store<E>(this->grad_x, c, sum);
    }
  }
};

template <template <class, int> class Op, class Arguments>
const char* run_mixture(const Arguments& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) {
    using E = decltype(e);
    return a.channels == 3 ? run_sites(Op<E, 3>(a), a.mixtures, launch) : run_sites(Op<E, 1>(a), a.mixtures, launch);
  });
}

}  // namespace

const char* categorical_kl(const CategoricalKl& arguments, const Launch& launch) {
  CategoricalKl a = arguments;
  align(a.grid, {&a.logits_q.at, &a.logits_p.at, &a.weights, &a.value, &a.rows});
  return run_kl<KlValueOp>(a, launch);
}

const char* categorical_kl_backward(const CategoricalKlBackward& arguments, const Launch& launch) {
  CategoricalKlBackward a = arguments;
  align(a.grid, {&a.grad, &a.grad_own_q, &a.grad_own_p, &a.logits_q.at, &a.logits_p.at, &a.weights, &a.rows, &a.grad_q.at,
                 &a.grad_p.at});
  return run_kl<KlBackwardOp>(a, launch);
}

const char* categorical_log_prob(const CategoricalLogProb& arguments, const Launch& launch) {
  CategoricalLogProb a = arguments;
  align(a.grid, {&a.logits.at, &a.x, &a.value});
  return dispatch(a.dtype, [&](auto e) { return run_sites(LogProbOp<decltype(e)>(a), a.classes, launch); });
}

const char* categorical_log_prob_backward(const CategoricalLogProbBackward& arguments, const Launch& launch) {
  CategoricalLogProbBackward a = arguments;
  align(a.grid, {&a.grad, &a.logits.at, &a.x, &a.grad_logits.at});
  return dispatch(a.dtype, [&](auto e) { return run_sites(LogProbBackwardOp<decltype(e)>(a), a.classes, launch); });
}

const char* logistic_mixture(const LogisticMixture& arguments, const Launch& launch) {
  LogisticMixture a = arguments;
  align(a.grid, {&a.params.at, &a.x.at, &a.value});
  return run_mixture<MixtureValueOp>(a, launch);
}

const char* logistic_mixture_backward(const LogisticMixtureBackward& arguments, const Launch& launch) {
  LogisticMixtureBackward a = arguments;
  align(a.grid, {&a.grad, &a.params.at, &a.x.at, &a.grad_params.at, &a.grad_x.at});
  return run_mixture<MixtureBackwardOp>(a, launch);
}

}  // namespace unigen::cuda
