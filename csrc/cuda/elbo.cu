// The evidence lower bound.
//
// A row's share of the loss is a sum, so the coefficients of its slopes are known before it is read: in one sweep the
// numbers are summed, and their gradients written from registers.
#include "objectives.cuh"

namespace unigen::cuda {
namespace {

// What both kernels are given.
struct ElboArguments : ElboTensors, Wanted {
  Operand log_likelihood, kl, value;
  Operand grad_value, grad_log_likelihood, grad_kl;  // absent: 1, 0 and 0
  bool sums;                                         // whether rows are summed, not only their gradients wanted
  double factor;                                     // of the slopes, beside a row's own

  ElboArguments(const ElboTensors& a, bool sums, bool slopes)
      : ElboTensors(a),
        Wanted(a),
        sums(sums),
        factor(a.reduction.scale / a.reduction.denominator) {
    reduction.reduce = reduction.reduce && sums;
    if (!slopes) of_elements = of_shared = of_latent = false;
  }
};

// of a row's log-likelihood and KL
template <class T>
struct ElboCoefficients {
  T of_log_likelihood, of_kl;
};

template <class Element, class Density>
struct ElboOp : ElboArguments, ObjectiveOp<ElboOp<Element, Density>, Element, Density> {
  using Base = ObjectiveOp<ElboOp, Element, Density>;
  using typename Base::F;
  using typename Base::T;
  using Base::number;
  using Base::put;
  template <int V>
  using Loaded = typename Base::template Loaded<V>;
  struct State {
    double log_likelihood = 0, kl = 0;
    T coefficient = 0;  // of the event's slopes
  };
  static constexpr bool kReduces = true, kTotals = true, kBegins = true;

  ElboOp(const ElboArguments& a, const Density& density) : ElboArguments(a), Base(density) {}

  UNIGEN_DEVICE ElboCoefficients<T> coefficients(const Rows& rows, int r) const {
    T loss = T(factor);
    if (grad_value.data) loss *= rows.at<T>(grad_value, r);
    if (weights.data) loss = weighted(rows.at<T>(weights, r), loss);
    return {(grad_log_likelihood.data ? rows.at<T>(grad_log_likelihood, r) : T(0)) - loss,
            (grad_kl.data ? rows.at<T>(grad_kl, r) : T(0)) + T(kl_weight) * loss};
  }

  UNIGEN_DEVICE void begin(const Rows& rows, int r, State& state, const Group& group, bool first) const {
    ElboCoefficients<T> c = {};
    if (of_elements || of_latent) c = coefficients(rows, r);
    state.coefficient = c.of_log_likelihood;
    if (!first || !(sums || of_latent)) return;
    const int64_t row = rows.row + r;
    const Rows latents{row, split(row, latent.row_dims, latent.row_size)};
    for (int64_t col = group.lane; col < latent.cols; col += group.lanes) {
      const Place<1, 1> at(latents, col, latent);
      const PriorKl<T> kl(number(mean, at), number(logvar, at), number(prior_mean, at), number(prior_logvar, at),
                          prior_logvar.data != nullptr, {Spread::logvar, -HUGE_VAL, HUGE_VAL});
      state.kl += double(kl.value);
      if (!of_latent) continue;
      if (grad_mean.data) put(grad_mean, at, weighted(c.of_kl, kl.d_mean));
      if (grad_logvar.data) put(grad_logvar, at, weighted(c.of_kl, kl.d_spread));
      if (grad_prior_mean.data) put(grad_prior_mean, at, weighted(c.of_kl, kl.d_prior_mean));
      if (grad_prior_logvar.data) put(grad_prior_logvar, at, weighted(c.of_kl, kl.d_prior_spread));
    }
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<C> (&given)[U], const bool (&valid)[U], const At& at) const {
    if (F::kLarge || !of_elements) {
      if (sums) state[0].log_likelihood += double(Base::log_prob(given, valid));
      if (!F::kLarge || !of_elements) return;
    }
    typename Base::Likelihood likelihood;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!valid[u]) continue;
      Base::write_slopes(at(u), state[0].coefficient, given[u], [&](const T (&in)[F::kInputs]) {
        if constexpr (!F::kLarge) likelihood.add(Base::density, in);  // while the registers hold what both take
      });
    }
    state[0].log_likelihood += double(likelihood.total());
  }

  UNIGEN_DEVICE void reduce(State& state, const Group& group) const {
    if (!sums) return;
    double both[2] = {state.log_likelihood, state.kl};
    group.reduce_each(both, Plus());
    state.log_likelihood = both[0];
    state.kl = both[1];
  }
  UNIGEN_DEVICE void merge(State& state, const State& other) const {
    state.log_likelihood += other.log_likelihood;
    state.kl += other.kl;
  }

  UNIGEN_DEVICE double finish(const Rows& rows, int r, const State& state) const {
    if (!sums) return 0;
    rows.at<T>(log_likelihood, r) = T(state.log_likelihood);
    rows.at<T>(kl, r) = T(state.kl);
    double loss = kl_weight * state.kl - state.log_likelihood;
    if (weights.data) loss = weighted(double(rows.at<T>(weights, r)), loss);
    if (!reduction.reduce) rows.at<T>(value, r) = T(loss * reduction.scale);
    return loss;
  }

  UNIGEN_DEVICE int64_t fill_window(int64_t row, int64_t end, const Tiling&, T* window, Rows& from) const {
    const int64_t count = end - row < kWindow ? end - row : kWindow;
    from = {row, {}};
    for (int64_t k = threadIdx.x; k < count; k += kThreads)
      window[k] = coefficients(row_of_window(from, k), 0).of_log_likelihood;
    return count;
  }
  UNIGEN_DEVICE Rows row_of_window(const Rows& from, int64_t k) const {
    return {from.row + k, split(from.row + k, grid.row_dims, grid.row_size)};
  }
};

template <class Op>
const char* run_elbo(const Op& op, const Launch& launch) {
  const char* error = nullptr;
  if (op.sums || op.of_elements || op.of_latent) {
    const Plan plan = make_plan(op, event_packs(op), op.decoder[0], op.sums, op.reduction.reduce, launch);
    Op rows = op;
    if (!op.sums && !op.of_elements) rows.grid.cols = 0;  // the latent alone
    error = run_plan(rows, plan, launch);
  }
  if constexpr (Op::kOutputs > 1) {
    if (!error && op.of_shared) error = run_shared_slopes(op, Tiling(), launch);
  }
  return error;
}

const char* run_elbo_arguments(ElboArguments a, const Launch& launch) {
  align(a.grid, {&a.x, &a.decoder[0], &a.decoder[1], &a.decoder[2], &a.grad_decoder[0], &a.grad_decoder[1],
                 &a.grad_decoder[2], &a.weights, &a.log_likelihood, &a.kl, &a.value, &a.grad_value,
                 &a.grad_log_likelihood, &a.grad_kl});
  align(a.latent, {&a.mean, &a.logvar, &a.prior_mean, &a.prior_logvar, &a.grad_mean, &a.grad_logvar, &a.grad_prior_mean,
                   &a.grad_prior_logvar});
  return with_likelihood(a.likelihood, [&](auto density) {
    return dispatch(a.dtype, [&](auto e) { return run_elbo(ElboOp<decltype(e), decltype(density)>(a, density), launch); });
  });
}

}  // namespace

const char* elbo_loss(const ElboLoss& given, const Launch& launch) {
  ElboArguments a(given, true, given.gradients);
  a.log_likelihood = given.log_likelihood;
  a.kl = given.kl;
  a.value = given.value;
  return run_elbo_arguments(a, launch);
}

const char* elbo_loss_backward(const ElboLossBackward& given, const Launch& launch) {
  ElboArguments a(given, false, true);
  a.grad_value = given.grad_value;
  a.grad_log_likelihood = given.grad_log_likelihood;
  a.grad_kl = given.grad_kl;
  return run_elbo_arguments(a, launch);
}

}  // namespace unigen::cuda
