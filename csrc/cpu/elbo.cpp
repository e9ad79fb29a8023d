// The evidence lower bound: what goes into a row's gradients is known before the row is read, so that one sweep finds its
// value and writes them.
#include "objectives.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {
namespace {

// KL(q || p) of a row.
template <class T>
class Divergence {
  using V = Vec<T>;
  static constexpr int kGaussians = 4;

 public:
  explicit Divergence(const ObjectiveTensors& a) : cols_(a.latent.cols), has_prior_logvar_(a.prior_logvar.data) {
    const Operand* in[kGaussians] = {&a.mean, &a.logvar, &a.prior_mean, &a.prior_logvar};
    const Operand* out[kGaussians] = {&a.grad_mean, &a.grad_logvar, &a.grad_prior_mean, &a.grad_prior_logvar};
    for (int k = 0; k < kGaussians; ++k) {
      in_[k] = Stream<T>(a.latent, {*in[k], a.latent_dtype}, Axis::rows, Axis::cols);
      out_[k] = Stream<T>(a.latent, {*out[k], a.latent_dtype}, Axis::rows, Axis::cols);
      wants_[k] = out[k]->data;
      any_ = any_ || wants_[k];
    }
  }

  bool any() const { return any_; }

  // `slopes`: its gradients, times the coefficient, are written
  UNIGEN_NOINLINE double value(int64_t row, bool slopes, T coefficient) const {
    alignas(kVectorBytes) T room[2 * kGaussians][kChunk<T>];
    const SpreadOptions logvar = {Spread::logvar, -HUGE_VAL, HUGE_VAL};
    const V factor(coefficient), zero(T(0));
    double total = 0;
    for (int64_t c = 0; c < cols_; c += kChunk<T>) {
      const int n = int(smaller(kChunk<T>, cols_ - c));
      const T* source[kGaussians];
      T* target[kGaussians] = {};
      for (int k = 0; k < kGaussians; ++k) {
        source[k] = in_[k].read(in_[k].origin(row), c, n, room[k]);
        if (slopes && wants_[k]) target[k] = out_[k].target(out_[k].origin(row), c, n, room[kGaussians + k]);
      }
      V sum(T(0));
      for_vectors<T>(n, [&](int i, auto l) UNIGEN_FORCED {
        V x[kGaussians];
        for (int k = 0; k < kGaussians; ++k) x[k] = load(source[k] + i, l);
        const PriorKl<V> kl(x[0], x[1], x[2], x[3], has_prior_logvar_, logvar);
        sum = keep(l, sum + kl.value, sum);
        const V slope[kGaussians] = {kl.d_mean, kl.d_spread, kl.d_prior_mean, kl.d_prior_spread};
        for (int k = 0; k < kGaussians; ++k) {
          if (target[k]) store(target[k] + i, coefficient == 0 ? zero : factor * slope[k], l);
        }
      });
      total += lane_sum(sum);
      for (int k = 0; k < kGaussians; ++k) {
        if (target[k]) out_[k].written(out_[k].origin(row), c, n, target[k]);
      }
    }
    return total;
  }

 private:
  int64_t cols_;
  bool has_prior_logvar_, wants_[kGaussians] = {}, any_ = false;
  Stream<T> in_[kGaussians], out_[kGaussians];
};

template <class T, class F>
class Elbo : Examples<T, F> {
  using Base = Examples<T, F>;
  using Base::count_, Base::cols_, Base::few_, Base::density_;

 public:
  // of a row's gradients
  struct Coefficients {
    T log_likelihood, kl;
  };

  Elbo(const ElboTensors& a, const F& formula, const Parallel& parallel)
      : Base(a, 1, formula, parallel),
        divergence_(a),
        weights_(a.grid, arithmetic(a.weights, a, 1), Axis::rows, Axis::none),
        factor_(T(a.reduction.scale / a.reduction.denominator)),
        kl_weight_(T(a.kl_weight)) {}

  T weight(int64_t row) const { return weights_.value(row); }

  // of grad · loss
  Coefficients coefficients(int64_t row, T grad) const {
    const T of_row = weight(row) == 0 ? T(0) : grad * weight(row) * factor_;
    return {-of_row, kl_weight_ * of_row};
  }

  // take(unit, row, log-likelihood, KL); returns how many units there are
  template <class Take>
  int64_t forward(bool gradients, const Take& take) const {
    if (!few_) {
      return this->by_example(gradients, [&](int64_t unit, int64_t begin, int64_t end, T* const* totals) {
        for (int64_t row = begin; row < end; ++row) {
          const Coefficients own = coefficients(row, 1);
          const double log_likelihood = gradients && density_.any()
                                            ? density_.value_and_gradients(row, 0, cols_, own.log_likelihood, totals)
                                            : density_.value(row, 0, cols_, false);
          take(unit, row, log_likelihood, divergence_.value(row, gradients, own.kl));
        }
      });
    }
    const bool at_once = gradients && density_.any() && !density_.sums();
    const std::vector<double> sums = this->by_piece([&](int64_t row, int64_t begin, int64_t end) {
      return at_once ? density_.value_and_gradients(row, begin, end, coefficients(row, 1).log_likelihood, nullptr)
                     : density_.value(row, begin, end, false);
    });
    std::vector<T> of_rows(count_);
    for (int64_t row = 0; row < count_; ++row) {
      const Coefficients own = coefficients(row, 1);
      of_rows[row] = own.log_likelihood;
      take(0, row, sums[row], divergence_.value(row, gradients, own.kl));
    }
    if (gradients && !at_once) this->pull_back(of_rows.data(), false);
    return 1;
  }

  // of(row): the coefficients
  template <class Of>
  void backward(const Of& of) const {
    if (!few_) {
      this->by_example(true, [&](int64_t, int64_t begin, int64_t end, T* const* totals) {
        for (int64_t row = begin; row < end; ++row) {
          const Coefficients own = of(row);
          if (density_.any()) density_.gradients(row, 0, cols_, own.log_likelihood, totals);
          if (divergence_.any()) divergence_.value(row, true, own.kl);
        }
      });
      return;
    }
    std::vector<T> of_rows(count_);
    for (int64_t row = 0; row < count_; ++row) {
      const Coefficients own = of(row);
      of_rows[row] = own.log_likelihood;
      if (divergence_.any()) divergence_.value(row, true, own.kl);
    }
    this->pull_back(of_rows.data(), false);
  }

 private:
  Divergence<T> divergence_;
  Stream<T> weights_;
  T factor_, kl_weight_;
};

template <class T, class F>
void elbo_loss_of(const ElboLoss& a, const F& formula, const Parallel& parallel) {
  const Elbo<T, F> elbo(a, formula, parallel);
  const auto of_rows = [&](const Operand& operand) {
    return Stream<T>(a.grid, arithmetic(operand, a), Axis::none, Axis::rows);
  };
  const Stream<T> log_likelihoods = of_rows(a.log_likelihood), kls = of_rows(a.kl), values = of_rows(a.value);
  double partial[kMaxUnits + kFewRows] = {};
  const int64_t units =
      elbo.forward(a.gradients, [&](int64_t unit, int64_t row, double log_likelihood, double kl) {
        const double weight = elbo.weight(row), loss = weight == 0 ? 0 : weight * (a.kl_weight * kl - log_likelihood);
        const T results[3] = {T(log_likelihood), T(kl), T(loss * a.reduction.scale)};
        log_likelihoods.write(0, row, 1, results);
        kls.write(0, row, 1, results + 1);
        if (!a.reduction.reduce) values.write(0, row, 1, results + 2);
        partial[unit] += loss;
      });
  close_reduction<T>(a.value, a.reduction, partial, units);
}

template <class T, class F>
void elbo_loss_backward_of(const ElboLossBackward& a, const F& formula, const Parallel& parallel) {
  const Elbo<T, F> elbo(a, formula, parallel);
  const auto of_rows = [&](const Operand& operand) {
    return Stream<T>(a.grid, arithmetic(operand, a), Axis::rows, Axis::none);
  };
  const Stream<T> grad_value = of_rows(a.grad_value), grad_log_likelihood = of_rows(a.grad_log_likelihood);
  const Stream<T> grad_kl = of_rows(a.grad_kl);
  elbo.backward([&](int64_t row) {
    auto found = elbo.coefficients(row, grad_value.value(row));
    found.log_likelihood += grad_log_likelihood.value(row);
    found.kl += grad_kl.value(row);
    return found;
  });
}

}  // namespace

void elbo_loss(const ElboLoss& a, const Parallel& parallel) {
  with_density(a, [&](auto t, auto formula) { elbo_loss_of<decltype(t)>(a, formula, parallel); });
}
void elbo_loss_backward(const ElboLossBackward& a, const Parallel& parallel) {
  with_density(a, [&](auto t, auto formula) { elbo_loss_backward_of<decltype(t)>(a, formula, parallel); });
}

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
