// Bounds of several samples.
//
// A team of blocks takes an example. They share its rows, and sum each to its log-weight; then every block forms the
// estimator of the whole example for itself, from a few numbers, and writes the gradients of its own rows, whose numbers
// are still in the L2 cache. In between the team meets: as a cluster where the device has them, else at the end of a launch.
#include "objectives.cuh"

namespace unigen::cuda {
namespace {

constexpr int kMaxCluster = 8;

// What both kernels are given.
struct BoundArguments : BoundTensors, Wanted {
  Operand bound, ess, value;
  Operand grad_value, grad_log_w;  // absent: 1 and 0
  int64_t examples, group_size;
  double factor;  // of the slopes

  explicit BoundArguments(const BoundTensors& a)
      : BoundTensors(a),
        Wanted(a),
        examples(a.samples > 0 ? a.grid.rows / a.samples : 0),
        group_size(a.samples / a.groups),
        factor(a.reduction.scale / a.reduction.denominator / double(a.groups)) {
    of_latent = of_latent || grad_z.data;
  }

  // An example's first row, in either grid, from which its samples are reached: they lie along the innermost dimension.
  UNIGEN_DEVICE Rows first_of(int64_t example, const Grid& of) const {
    return {example * samples, split(example * samples, of.row_dims, of.row_size)};
  }
};

// k rows after an example's first
UNIGEN_DEVICE Rows sample(Rows rows, int64_t k) {
  rows.row += k;
  rows.index.i[kInnermost] += k;
  return rows;
}

// Bound and effective sample size, summed over groups of samples.
struct GroupSums {
  double bound = 0, ess = 0;
};

// A row's log-weight, its share of the gradients, and an example's estimator. An op of rows.cuh, so that a Batch loads and
// writes it; the kernels below call the rest.
template <class Element, class Density>
struct BoundOp : BoundArguments, ObjectiveOp<BoundOp<Element, Density>, Element, Density> {
  using Base = ObjectiveOp<BoundOp, Element, Density>;
  using typename Base::T;
  using Base::number;
  using Row = T;  // its coefficient

  BoundOp(const BoundArguments& a, const Density& density) : BoundArguments(a), Base(density) {}

  template <int C>
  UNIGEN_DEVICE void write(const Place<1, C>& place, const Row (&coefficient)[1],
                           const typename Base::template Loaded<C>& given) const {
    Base::write_slopes(place, coefficient[0], given, [](const auto&) {});
  }

  // what the samples of an example have in common, of an element of the latent
  struct Gaussians {
    T mean, rate, prior_mean, prior_rate;
    T half_log_ratio;  // of the variances

    UNIGEN_DEVICE Gaussians(const BoundOp& op, const Place<1, 1>& at) {
      const T logvar = op.number(op.logvar, at), prior_logvar = op.number(op.prior_logvar, at);
      mean = op.number(op.mean, at);
      prior_mean = op.number(op.prior_mean, at);
      rate = Standardized<T>::rate_of(logvar);
      prior_rate = Standardized<T>::rate_of(prior_logvar);
      half_log_ratio = T(0.5) * (logvar - prior_logvar);
    }
    UNIGEN_DEVICE LatentTerms<T> terms(T z) const { return {z, mean, rate, prior_mean, prior_rate}; }
  };

  UNIGEN_DEVICE T latent_log_ratio(const Place<1, 1>& at) const {
    const Gaussians gaussians(*this, at);
    return gaussians.half_log_ratio + gaussians.terms(number(z, at)).value();
  }

  // ---- the estimator ----

  // Forms the estimator of the groups of samples that [from, to) overlaps, or of `every` one, whose bounds it then returns: to
  // the first thread, if there is one group. Writes the coefficients of [from, to). All threads of a block call it.
  UNIGEN_DEVICE GroupSums estimate(const Rows& first, int64_t from, int64_t to, bool every, const Tiling& tile,
                                   T* coefficients) const {
    const Group group(tile);
    const int64_t size = group_size, stride = log_w.row[kInnermost];  // residual's, too
    const T* const weights = &first.template at<T>(log_w, 0);
    const T* const residuals = &first.template at<T>(residual, 0);
    const auto log_weight = [&](int64_t k) { return double(weights[k * stride]) + double(residuals[k * stride]); };
    const PowerBound f{{double(size)}, {power}, elbo_weight};
    const PowerSlope slope{{factor}, {power}, elbo_weight, double(size)};
    int64_t group_begin = 0, group_end = groups, rest;
    if (!every && groups > 1) {
      divide(from, size, group_begin, rest);
      divide(to - 1, size, group_end, rest);
      ++group_end;
    }
    GroupSums found;
    for (int64_t g = group_begin; g < group_end; g += group.tile_rows) {
      const bool live = g + group.row < group_end;
      const int64_t begin = (g + group.row) * size, end = live ? begin + size : begin;
      double largest = -HUGE_VAL, ends[PowerBound::kKept];
      T kept[PowerBound::kKept], sums[PowerBound::kSums];
      double totals[PowerBound::kSums + 1] = {};  // the last is of squares
      for (int64_t k = begin + group.lane; k < end; k += group.lanes) {
        const double l = log_weight(k);
        largest = larger(largest, f.key(&l));
      }
      largest = group.reduce(largest, Maximum());
      f.open(largest, largest, ends);
      const double base = ends[0];  // from here on log-weights are relative to it
      kept[0] = 0;
      kept[4] = T(ends[4]);
      for (int64_t k = begin + group.lane; k < end; k += group.lanes) {
        const T l = T(log_weight(k) - base);
        T terms[PowerBound::kSums];
        f.terms(0, kept, &l, terms);
#pragma unroll
        for (int s = 0; s < PowerBound::kSums; ++s) totals[s] += double(terms[s]);
        totals[PowerBound::kSums] += double(terms[0] * terms[0]);
      }
      group.reduce_each(totals, Plus());
#pragma unroll
      for (int s = 0; s < PowerBound::kSums; ++s) sums[s] = T(totals[s]);
      f.close(0, sums, kept, static_cast<T*>(nullptr));
      if (every && live && group.lane == 0) {
        T value;
        f.values(kept, &value);
        found.bound += base + double(value);
        found.ess += double(effective_samples(kept[1], T(totals[PowerBound::kSums])));
      }
      const T grad = grad_value.data ? first.template at<T>(grad_value, 0) : T(1), operands[3] = {grad, kept[0], kept[1]};
      T row[PowerSlope::kKept];
      slope.prepare(operands, row);
      const int64_t stop = end < to ? end : to;
      for (int64_t k = (begin < from ? from : begin) + group.lane; k < stop; k += group.lanes) {
        const T l = T(log_weight(k) - base);
        T c;
        slope(row, &l, &c);
        if (grad == 0) c = 0;  // whatever the weights are
        coefficients[k - from] = grad_log_w.data ? c + sample(first, k).template at<T>(grad_log_w, 0) : c;
      }
    }
    return found;
  }

  // The coefficients of rows of one example from `row` on, `end` at most: their number, and the first of them.
  UNIGEN_DEVICE int64_t fill_window(int64_t row, int64_t end, const Tiling& tile, T* coefficients, Rows& from) const {
    int64_t example, k;
    divide(row, samples, example, k);
    int64_t count = samples - k < end - row ? samples - k : end - row;
    if (count > kWindow) count = kWindow;
    const Rows first = first_of(example, grid);
    estimate(first, k, k + count, false, tile, coefficients);
    from = sample(first, k);
    return count;
  }
  UNIGEN_DEVICE Rows row_of_window(const Rows& from, int64_t k) const { return sample(from, k); }

  UNIGEN_DEVICE void put_estimate(const Rows& rows, T mean_bound, T mean_ess) const {
    rows.template at<T>(bound, 0) = mean_bound;
    rows.template at<T>(ess, 0) = mean_ess;
    if (!reduction.reduce) rows.template at<T>(value, 0) = mean_bound * T(reduction.scale);
  }
};

struct BoundTiling {
  Tiling rows, groups;  // whose lanes share a row of the event, and a group of samples
  int64_t share = 1;    // blocks of a team
  bool clustered = false;
  bool weighs = false, estimates = false, slopes = false;  // what is done: log-weights, the bounds, gradients
};

template <class Op, int C>
__global__ void __launch_bounds__(kThreads, kResidentOf<Op>)
    bound_kernel(const __grid_constant__ Op op, const __grid_constant__ BoundTiling tile) {
  using T = typename Op::T;
  using Packs = Batch<Op, 1, C>;
  __shared__ T coefficients[kWindow];
  const Group group(tile.rows);
  const int64_t step = int64_t(group.lanes) * C;
  int64_t example, rank;
  divide(blockIdx.x, tile.share, example, rank);
  __shared__ Rows first, first_latent;  // here they take no registers
  if (threadIdx.x == 0) {
    first = op.first_of(example, op.grid);
    first_latent = op.first_of(example, op.latent);
  }
  __syncthreads();
  const int64_t begin = op.samples * rank / tile.share, end = op.samples * (rank + 1) / tile.share;
  if (tile.weighs) {
    for (int64_t k = begin; k < end; k += group.tile_rows) {
      const bool live = k + group.row < end;
      const Rows rows = sample(first, k + (live ? group.row : 0));
      double sum = 0;
      for (int64_t col = int64_t(group.lane) * C; live && col < op.grid.cols; col += step * Packs::U) {
        Packs batch;
        batch.load(op, rows, col, op.grid.cols, step);
        sum += double(op.template log_prob<C>(batch.x, batch.valid));
      }
      const Rows latents = sample(first_latent, k + (live ? group.row : 0));
      for (int64_t col = group.lane; live && col < op.latent.cols; col += group.lanes)
        sum += double(op.latent_log_ratio(Place<1, 1>(latents, col, op.latent)));
      sum = group.reduce(sum, Plus());
      if (live && group.lane == 0) {
        const T rounded = T(sum);
        rows.at<T>(op.log_w, 0) = rounded;
        rows.at<T>(op.residual, 0) = sum - sum == 0 ? T(sum - double(rounded)) : T(0);
      }
    }
    if (tile.clustered) sync_cluster();
  }

  // The block's rows, window after window of the coefficients; then the latent's elements, 32 at a time, over all samples.
  const bool estimates = tile.estimates && rank == 0;
  if (!estimates && !tile.slopes) return;
  const Group columns = column_group();
  double mean = 0, logvar = 0, prior_mean = 0, prior_logvar = 0;
  int64_t held = -1, window = begin / kWindow * kWindow, col = (rank - tile.share) * kWarp;
  for (bool of_rows = true; of_rows || (op.of_latent && col < op.latent.cols);) {
    const int64_t window_end = window + kWindow < op.samples ? window + kWindow : op.samples;
    if (held != window) {
      const bool every = estimates && held < 0;
      __syncthreads();
      GroupSums found = op.estimate(first, window, window_end, every, tile.groups, coefficients);
      __syncthreads();
      held = window;
      if (every) {
        if (op.groups > 1) {
          found.bound = Group::block().reduce(found.bound, Plus()) / double(op.groups);
          found.ess = Group::block().reduce(found.ess, Plus()) / double(op.groups);
        }
        if (threadIdx.x == 0) op.put_estimate(first, T(found.bound), T(found.ess));
        if (!tile.slopes) return;
      }
    }
    if (of_rows) {
      const int64_t stop = end < window_end ? end : window_end;
      for (int64_t k = (begin < window ? window : begin) + group.row; op.of_elements && k < stop; k += group.tile_rows) {
        const Rows rows = sample(first, k);
        const T coefficient[1] = {coefficients[k - window]};
        for (int64_t c = int64_t(group.lane) * C; c < op.grid.cols; c += step * Packs::U) {
          Packs batch;
          batch.load(op, rows, c, op.grid.cols, step);
          batch.write(op, rows, c, step, coefficient);
        }
      }
    } else if (col + columns.row < op.latent.cols) {
      const typename Op::Gaussians gaussians(op, Place<1, 1>(first_latent, col + columns.row, op.latent));
      for (int64_t k = window + columns.lane; k < window_end; k += columns.lanes) {
        const T c = coefficients[k - window];
        const Place<1, 1> at = Place<1, 1>(sample(first_latent, k), col + columns.row, op.latent);
        const LatentTerms<T> terms = gaussians.terms(op.number(op.z, at));
        if (op.grad_z.data) op.put(op.grad_z, at, weighted(c, terms.of_z()));
        mean += double(weighted(c, terms.of_mean()));
        logvar += double(weighted(c, terms.of_logvar()));
        prior_mean += double(weighted(c, terms.of_prior_mean()));
        prior_logvar += double(weighted(c, terms.of_prior_logvar()));
      }
    }
    window += kWindow;
    if (window < (of_rows ? end : op.samples)) continue;
    window = 0;
    if (!of_rows) {
      const auto put_sum = [&](const Operand& o, double& sum) {
        if (!o.data) return;
        sum = columns.reduce(sum, Plus());
        if (col + columns.row < op.latent.cols && columns.lane == 0)
          op.put(o, Place<1, 1>(first_latent, col + columns.row, op.latent), T(sum));
        sum = 0;
      };
      put_sum(op.grad_mean, mean);
      put_sum(op.grad_logvar, logvar);
      put_sum(op.grad_prior_mean, prior_mean);
      put_sum(op.grad_prior_logvar, prior_logvar);
    }
    of_rows = false;
    col += tile.share * kWarp;
  }
}

// one block: the sum over the examples
template <class T>
__global__ void __launch_bounds__(kThreads, kResident) bound_total_kernel(const __grid_constant__ BoundArguments a) {
  double total = 0;
  for (int64_t example = threadIdx.x; example < a.examples; example += kThreads)
    total += double(a.first_of(example, a.grid).template at<T>(a.bound, 0));
  total = Group::block().reduce(total, Plus());
  if (threadIdx.x == 0) *static_cast<T*>(a.value.data) = T(total * a.reduction.scale / a.reduction.denominator);
}

// The largest share that gives each thread two packs, each block a row, and the device no more blocks than keep it busy.
template <class Op>
int64_t choose_share(const Op& op, int64_t packs, int64_t most, const Launch& launch) {
  const int64_t enough = int64_t(launch.multiprocessors) * 4;
  int64_t share = 1;
  while (2 * share <= most && 2 * share <= op.samples && op.examples * share < enough &&
         op.samples * packs >= 4 * share * kThreads) {
    share *= 2;
  }
  return share;
}

template <class Op>
const char* run_bound(const Op& op, bool weighs, bool slopes, const Launch& launch) {
  const Packs packs_of = event_packs(op);
  const int64_t packs = divide_up(op.grid.cols, packs_of.cols);
  // clusters, unless examples are so few that larger teams are worth a second launch
  const bool clusters = has_clusters() && op.examples * 2 * kMaxCluster >= launch.multiprocessors;
  BoundTiling tile;
  tile.share = choose_share(op, packs, weighs && clusters ? kMaxCluster : kMaxBlocks, launch);
  const int64_t rows = divide_up(op.samples, tile.share);  // of a block
  while ((1 << tile.rows.lane_bits) < kWarp && packs > 2 << tile.rows.lane_bits) ++tile.rows.lane_bits;
  while ((1 << tile.rows.lane_bits) < kThreads && packs > 1 << tile.rows.lane_bits &&
         kThreads >> tile.rows.lane_bits >= 2 * rows) {
    ++tile.rows.lane_bits;
  }
  const int most = op.group_size > 8 * kWarp ? kThreads : kWarp;
  while ((1 << tile.groups.lane_bits) < most && 1 << tile.groups.lane_bits < op.group_size) ++tile.groups.lane_bits;
  const auto run = [&](bool weigh, bool estimate, bool slope) {
    tile.weighs = weigh;
    tile.estimates = estimate;
    tile.slopes = slope;
    if (!weigh && !slope) tile.share = 1;
    tile.clustered = weigh && estimate && tile.share > 1;
    const auto launch_kernel = [&](auto kernel) {
      const int64_t blocks = op.examples * tile.share;
      return tile.clustered ? start_clusters(kernel, blocks, tile.share, launch, op, tile)
                            : start(kernel, blocks, 1, launch, op, tile);
    };
    if constexpr (Op::kVector > 1) {
      if (packs_of.cols > 1) return launch_kernel(bound_kernel<Op, Op::kVector>);
    }
    return launch_kernel(bound_kernel<Op, 1>);
  };

  const bool own_slopes = slopes && (op.of_elements || op.of_latent);
  const char* error = nullptr;
  if (op.examples > 0) {
    if (!weighs) {
      error = own_slopes ? run(false, false, true) : nullptr;
    } else if (tile.share == 1 || clusters) {
      error = run(true, true, own_slopes);
    } else {
      error = run(true, false, false);
      if (!error) error = run(false, true, own_slopes);
    }
  }
  const BoundArguments& a = op;
  if (!error && weighs && op.reduction.reduce) error = start(bound_total_kernel<typename Op::T>, 1, 1, launch, a);
  if constexpr (Op::kOutputs > 1) {
    if (!error && slopes && op.of_shared) error = run_shared_slopes(op, tile.groups, launch);
  }
  return error;
}

const char* run_bound_arguments(BoundArguments a, bool weighs, bool slopes, const Launch& launch) {
  align(a.grid, {&a.x, &a.decoder[0], &a.decoder[1], &a.decoder[2], &a.grad_decoder[0], &a.grad_decoder[1],
                 &a.grad_decoder[2], &a.log_w, &a.residual, &a.bound, &a.ess, &a.value, &a.grad_value, &a.grad_log_w});
  align(a.latent, {&a.z, &a.mean, &a.logvar, &a.prior_mean, &a.prior_logvar, &a.grad_z, &a.grad_mean, &a.grad_logvar,
                   &a.grad_prior_mean, &a.grad_prior_logvar});
  if (a.log_w.row[kInnermost] != a.residual.row[kInnermost]) return "expected log_w and residual of the same strides";
  return with_likelihood(a.likelihood, [&](auto density) {
    return dispatch(a.dtype, [&](auto e) {
      return run_bound(BoundOp<decltype(e), decltype(density)>(a, density), weighs, slopes, launch);
    });
  });
}

}  // namespace

const char* sampled_bound(const SampledBound& given, const Launch& launch) {
  BoundArguments a(given);
  a.bound = given.bound;
  a.ess = given.ess;
  a.value = given.value;
  return run_bound_arguments(a, true, given.gradients, launch);
}

const char* sampled_bound_backward(const SampledBoundBackward& given, const Launch& launch) {
  BoundArguments a(given);
  a.grad_value = given.grad_value;
  a.grad_log_w = given.grad_log_w;
  return run_bound_arguments(a, false, true, launch);
}

}  // namespace unigen::cuda
