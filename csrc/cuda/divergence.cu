// Gaussian divergences, and reparameterised samples drawn together with them.
#include "../formulas/divergence.h"

#include "../formulas/philox.h"
#include "rows.cuh"

namespace unigen::cuda {
namespace {

// ---- KL ------------------------------------------------------------------------------------------------------------

// The packs of one place: prior operands are there only for kPrior.
template <class E, int V, bool kPrior>
struct Gaussians {
  Pack<E, V> mean, spread, prior_mean, prior_spread;
};
template <class E, int V>
struct Gaussians<E, V, false> {
  Pack<E, V> mean, spread;
};

template <class E, bool kPrior, int R, int C, class Arguments>
UNIGEN_DEVICE Gaussians<E, R * C, kPrior> load_gaussians(const Place<R, C>& place, const Arguments& a) {
  Gaussians<E, R * C, kPrior> x;
  x.mean = place.template load<E>(a.mean);
  x.spread = place.template load<E>(a.spread);
  if constexpr (kPrior) {
    if (a.prior_mean.data) x.prior_mean = place.template load<E>(a.prior_mean);
    if (a.prior_spread.data) x.prior_spread = place.template load<E>(a.prior_spread);
  }
  return x;
}

template <class Element, bool kPrior>
struct GaussianKlOp : GaussianKl, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Sum;
  static constexpr bool kReduces = true, kTotals = true;
  static constexpr int kVector = kWidest<E>, kUnroll = kPrior ? 2 : 4;
  template <int V>
  using Loaded = Gaussians<E, V, kPrior>;

  explicit GaussianKlOp(const GaussianKl& a) : GaussianKl(a) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return load_gaussians<E, kPrior>(place, *this);
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At) const {
    const T floor = T(dim_floor);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      T sum = 0;
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int v = r + c;
          if (!valid[u]) continue;
          const T m = x[u].mean.template get<T>(v), s = x[u].spread.template get<T>(v);
          T kl;
          if constexpr (kPrior) {
            const T prior_m = prior_mean.data ? x[u].prior_mean.template get<T>(v) : T(0);
            const T prior_s = prior_spread.data ? x[u].prior_spread.template get<T>(v) : T(0);
            kl = PriorKl<T>(m, s, prior_m, prior_s, prior_spread.data != nullptr, options).value;
          } else {
            kl = StandardKl<T>(m, s, options).value;
          }
          sum += maximum(kl, floor);
        }
      }
      state[r].value += double(sum);
    }
  }

  UNIGEN_DEVICE double finish(const Rows& at, int r, const State& s) const {
    T kl = T(s.value);
    if (rows.data) at.at<T>(rows, r) = kl;
    kl = maximum(kl, T(row_floor));
    if (weights.data) kl = weighted(at.at<T>(weights, r), kl);
    if (!reduction.reduce) at.at<T>(value, r) = kl * T(reduction.scale);
    return double(kl);
  }
};

template <class Element, bool kPrior>
struct GaussianKlBackwardOp : GaussianKlBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using Row = T;  // its gradient, weight and scale included
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = kPrior && sizeof(E) == 2 ? 1 : 2;
  template <int V>
  using Loaded = Gaussians<E, V, kPrior>;

  explicit GaussianKlBackwardOp(const GaussianKlBackward& a) : GaussianKlBackward(a) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return load_gaussians<E, kPrior>(place, *this);
  }

  UNIGEN_DEVICE Row context(const Rows& at, int r, NoState) const {
    T g = at.at<T>(grad, r) * T(reduction.scale / reduction.denominator);
    if (weights.data) g = weighted(at.at<T>(weights, r), g);
    if (rows.data && at.at<T>(rows, r) < T(row_floor)) g = 0;
    return g;
  }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&row)[R], const Loaded<R * C>& x) const {
    constexpr int V = R * C;
    const T floor = T(dim_floor);
    T d_mean[V], d_spread[V], d_prior_mean[V], d_prior_spread[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T m = x.mean.template get<T>(v), s = x.spread.template get<T>(v);
      T g = row[R > 1 ? v : 0];
      if constexpr (kPrior) {
        const T prior_m = prior_mean.data ? x.prior_mean.template get<T>(v) : T(0);
        const T prior_s = prior_spread.data ? x.prior_spread.template get<T>(v) : T(0);
        const PriorKl<T> kl(m, s, prior_m, prior_s, prior_spread.data != nullptr, options);
        g = select(kl.value < floor, T(0), g);
        d_mean[v] = weighted(g, kl.d_mean);
        d_spread[v] = weighted(g, kl.d_spread);
        d_prior_mean[v] = weighted(g, kl.d_prior_mean);
        d_prior_spread[v] = weighted(g, kl.d_prior_spread);
      } else {
        const StandardKl<T> kl(m, s, options);
        g = select(kl.value < floor, T(0), g);
        d_mean[v] = weighted(g, kl.d_mean);
        d_spread[v] = weighted(g, kl.d_spread);
      }
    }
    if (grad_mean.data) place.template store<E>(grad_mean, d_mean);
    if (grad_spread.data) place.template store<E>(grad_spread, d_spread);
    if constexpr (kPrior) {
      if (grad_prior_mean.data) place.template store<E>(grad_prior_mean, d_prior_mean);
      if (grad_prior_spread.data) place.template store<E>(grad_prior_spread, d_prior_spread);
    }
  }
};

// ---- samples -------------------------------------------------------------------------------------------------------

struct Seed {
  uint64_t seed, offset;

  UNIGEN_DEVICE explicit Seed(const int64_t* rng_state) : seed(rng_state[0]), offset(rng_state[1]) {}
};

UNIGEN_DEVICE float square_root(float x) { return ::sqrtf(x); }
UNIGEN_DEVICE double square_root(double x) { return ::sqrt(x); }
UNIGEN_DEVICE void sine_cosine_pi(float x, float& sine, float& cosine) { ::sincospif(x, &sine, &cosine); }
UNIGEN_DEVICE void sine_cosine_pi(double x, double& sine, double& cosine) { ::sincospi(x, &sine, &cosine); }

// Box-Muller of two words: see formulas/philox.h
template <class T>
UNIGEN_DEVICE void normal_pair(uint32_t word, uint32_t next_word, T& first, T& second) {
  const T radius = square_root(T(-2) * log(T((word >> 8) + 1) * T(1.0 / (1 << 24))));
  T sine, cosine;
  sine_cosine_pi(T(next_word >> 8) * T(1.0 / (1 << 23)), sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Normals of V neighbouring elements of z, the first being element i: V is 1, or i is a multiple of V = 4.
template <class T, int V>
UNIGEN_DEVICE void draw(const Seed& seed, int64_t i, T (&noise)[V]) {
  static_assert(V == 1 || V == 4, "a block of Philox has 4 words");
  const PhiloxBlock block = philox(uint64_t(i) / 4, seed.seed, seed.offset);
  if constexpr (V == 4) {
    normal_pair(block.word[0], block.word[1], noise[0], noise[1]);
    normal_pair(block.word[2], block.word[3], noise[2], noise[3]);
  } else {
    const bool upper = i & 2;
    T first, second;
    normal_pair(upper ? block.word[2] : block.word[0], upper ? block.word[3] : block.word[1], first, second);
    noise[0] = i & 1 ? second : first;
  }
}

// Where the samples of an element are in z, and in the noise.
struct SampleIndex {
  int64_t first, inner;

  UNIGEN_DEVICE SampleIndex(int64_t element, int64_t samples, int64_t inner) : inner(inner) {
    if (samples == 1) {
      first = element;
    } else {
      int64_t outer, rest;
      divide(element, inner, outer, rest);
      first = outer * samples * inner + rest;
    }
  }

  UNIGEN_DEVICE int64_t operator[](int64_t sample) const { return first + sample * inner; }
};

// Without row operands, rows and columns that lie one behind the other are but one row: longer packs.
inline void join_rows(Grid& grid, std::initializer_list<Operand*> operands) {
  if (grid.row_dims > 1 || grid.col_dims > 1 || grid.rows * grid.cols == 0) return;
  for (const Operand* o : operands)
    if (grid.rows > 1 && grid.cols > 1 && o->row[kInnermost] != grid.cols * o->col[kInnermost]) return;
  for (Operand* o : operands) {
    if (grid.cols == 1) o->col[kInnermost] = o->row[kInnermost];
    o->row[kInnermost] = 0;
  }
  grid.cols *= grid.rows;
  grid.col_size[kInnermost] = grid.cols;
  grid.rows = grid.row_size[kInnermost] = 1;
}

// Packs of 4 elements, if they have neighbouring samples, in one block of noise.
template <class Op>
Packs choose_sample_packs(const Op& op, std::initializer_list<Element> elements) {
  const Packs packs = choose_packs<Op>(op.grid, elements);
  const bool by_four = op.samples == 1 || op.inner % 4 == 0;
  return by_four && (packs.rows == 1 || op.grid.cols == 1) ? packs : Packs();
}

// KL to N(0, 1) of each row, where wanted, and z on the way; blockIdx.y numbers ranges of samples.
template <class Element>
struct SampleOp : SampleGaussian, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using State = Sum;
  static constexpr bool kReduces = true;
  static constexpr int kVector = sizeof(E) == 8 ? 1 : 4, kUnroll = 2;

  int64_t samples_of_block = 1;

  explicit SampleOp(const SampleGaussian& a) : SampleGaussian(a) {}

  template <int V>
  struct Loaded {
    Pack<E, V> mean, spread;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<E>(mean), place.template load<E>(spread)};
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At at) const {
    constexpr int V = R * C;
    const int64_t begin = int64_t(blockIdx.y) * samples_of_block;
    const int64_t end = begin + samples_of_block < samples ? begin + samples_of_block : samples;
    const Seed seed(rng_state);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!valid[u]) continue;
      T center[V], deviation[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        center[v] = x[u].mean.template get<T>(v);
        deviation[v] = StandardDeviation<T>(x[u].spread.template get<T>(v), options).value;
      }
      if (kl.data) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          T sum = 0;
#pragma unroll
          for (int c = 0; c < C; ++c)
            sum += StandardKl<T>(center[r + c], x[u].spread.template get<T>(r + c), options).value;
          state[r].value += double(sum);
        }
      }
      const Place<R, C> place = at(u);
      const SampleIndex index(place.rows.row * grid.cols + place.col, samples, inner);
      for (int64_t s = begin; s < end; ++s) {
        T noise[V];
        draw(seed, index[s], noise);
        Pack<E, V> drawn;
#pragma unroll
        for (int v = 0; v < V; ++v) drawn.x[v] = static_cast<E>(center[v] + deviation[v] * noise[v]);
        *reinterpret_cast<Pack<E, V>*>(static_cast<E*>(z) + index[s]) = drawn;
      }
    }
  }

  UNIGEN_DEVICE double finish(const Rows& rows, int r, const State& s) const {
    if (kl.data) rows.at<T>(kl, r) = T(s.value);
    return s.value;
  }
};

// Sums over the samples: the lanes of a pack of elements take them in turn.
template <class Element>
struct SampleBackwardOp : SampleGaussianBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  static constexpr int kVector = sizeof(E) == 8 ? 1 : 4;

  explicit SampleBackwardOp(const SampleGaussianBackward& a) : SampleGaussianBackward(a) {}
};

template <class Op, int R, int C>
__global__ void __launch_bounds__(kThreads, kResident)
    sample_backward_kernel(const __grid_constant__ Op op, const __grid_constant__ Tiling tile) {
  using E = typename Op::E;
  using T = typename Op::T;
  constexpr int V = R * C;
  const Group group(tile);
  const Seed seed(op.rng_state);
  const int64_t row_packs = op.grid.cols / C, packs = op.grid.rows / R * row_packs;
  for (int64_t block = blockIdx.x; block < tile.row_tiles; block += gridDim.x) {
    const int64_t pack = block * group.tile_rows + group.row;
    const bool live = pack < packs;
    int64_t row, col;
    divide(live ? pack : 0, row_packs, row, col);
    row *= R;
    col *= C;
    const Place<R, C> place({row, split(row, op.grid.row_dims, op.grid.row_size)}, col, op.grid);
    const SampleIndex index(row * op.grid.cols + col, op.samples, op.inner);
    Pack<E, V> mean, spread;
    T sum[V] = {}, noise_sum[V] = {};  // of the gradient, of gradient times noise
    if (live) {
      mean = place.template load<E>(op.mean);
      spread = place.template load<E>(op.spread);
      if (op.grad_z.data) {
#pragma unroll 2
        for (int64_t s = group.lane; s < op.samples; s += group.lanes) {
          const Pack<E, V> grad = place.template load<E>(op.grad_z, s * op.grad_z_sample_stride);
          T noise[V];
          draw(seed, index[s], noise);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const T g = grad.template get<T>(v);
            sum[v] += g;
            noise_sum[v] += g * noise[v];
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v] = group.reduce(sum[v], Plus());
      noise_sum[v] = group.reduce(noise_sum[v], Plus());
    }
    if (!live || group.lane != 0) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const T s = spread.template get<T>(v);
      noise_sum[v] = weighted(noise_sum[v], StandardDeviation<T>(s, op.options).slope);
      if (op.grad_kl.data) {
        const T grad = place.rows.template at<T>(op.grad_kl, R > 1 ? v : 0);
        const StandardKl<T> kl(mean.template get<T>(v), s, op.options);
        sum[v] += weighted(grad, kl.d_mean);
        noise_sum[v] += weighted(grad, kl.d_spread);
      }
    }
    if (op.grad_mean.data) place.template store<E>(op.grad_mean, sum);
    if (op.grad_spread.data) place.template store<E>(op.grad_spread, noise_sum);
  }
}

template <class Op>
const char* run_sample_backward(const Op& op, Packs packs, const Launch& launch) {
  const int64_t count = op.grid.rows * op.grid.cols / (packs.rows * packs.cols);
  if (count == 0) return nullptr;
  Tiling tile;
  tile.transposed = true;
  while (tile.lane_bits < 5 && (int64_t(2) << tile.lane_bits) <= op.samples &&
         (count << tile.lane_bits) < int64_t(launch.multiprocessors) * 1024) {
    ++tile.lane_bits;
  }
  tile.row_tiles = divide_up(count, kThreads >> tile.lane_bits);
  const int64_t blocks = clamp(tile.row_tiles, 1, kMaxBlocks);
  constexpr int V = Op::kVector;
  if constexpr (V > 1) {
    if (packs.cols > 1) return start(sample_backward_kernel<Op, 1, V>, blocks, 1, launch, op, tile);
    if (packs.rows > 1) return start(sample_backward_kernel<Op, V, 1>, blocks, 1, launch, op, tile);
  }
  return start(sample_backward_kernel<Op, 1, 1>, blocks, 1, launch, op, tile);
}

}  // namespace

const char* gaussian_kl(const GaussianKl& arguments, const Launch& launch) {
  GaussianKl a = arguments;
  align(a.grid, {&a.mean, &a.spread, &a.prior_mean, &a.prior_spread, &a.weights, &a.value, &a.rows});
  return dispatch(a.dtype, [&](auto e) {
    using E = decltype(e);
    const int bytes = sizeof(E);
    const auto run = [&](const auto& op) {
      return run_rows(op, {{&a.mean, bytes}, {&a.spread, bytes}, {&a.prior_mean, bytes}, {&a.prior_spread, bytes}},
                      launch, a.reduction.reduce);
    };
    return a.has_prior() ? run(GaussianKlOp<E, true>(a)) : run(GaussianKlOp<E, false>(a));
  });
}

const char* gaussian_kl_backward(const GaussianKlBackward& arguments, const Launch& launch) {
  GaussianKlBackward a = arguments;
  align(a.grid, {&a.grad, &a.mean, &a.spread, &a.prior_mean, &a.prior_spread, &a.weights, &a.rows, &a.grad_mean,
                 &a.grad_spread, &a.grad_prior_mean, &a.grad_prior_spread});
  return dispatch(a.dtype, [&](auto e) {
    using E = decltype(e);
    const int bytes = sizeof(E);
    const auto run = [&](const auto& op) {
      return run_rows(op,
                      {{&a.mean, bytes},
                       {&a.spread, bytes},
                       {&a.prior_mean, bytes},
                       {&a.prior_spread, bytes},
                       {&a.grad_mean, bytes, true},
                       {&a.grad_spread, bytes, true},
                       {&a.grad_prior_mean, bytes, true},
                       {&a.grad_prior_spread, bytes, true}},
                      launch);
    };
    return a.has_prior() ? run(GaussianKlBackwardOp<E, true>(a)) : run(GaussianKlBackwardOp<E, false>(a));
  });
}

const char* sample_gaussian(const SampleGaussian& arguments, const Launch& launch) {
  SampleGaussian a = arguments;
  align(a.grid, {&a.mean, &a.spread, &a.kl});
  const bool with_kl = a.kl.data;
  if (!with_kl) join_rows(a.grid, {&a.mean, &a.spread});
  return dispatch(a.dtype, [&](auto e) {
    using Op = SampleOp<decltype(e)>;
    const int bytes = sizeof(e);
    Op op(a);
    const bool z_aligned = reinterpret_cast<uintptr_t>(a.z) % (sizeof(e) * Op::kVector) == 0;
    const Packs packs = z_aligned ? choose_sample_packs(op, {{&a.mean, bytes}, {&a.spread, bytes}}) : Packs();
    Plan plan = make_plan(op, packs, a.mean, with_kl, false, launch);
    // few blocks: let several of them share the samples
    const int64_t most = clamp(a.samples, 1, 65535);
    plan.blocks_y = plan.blocks == 0 ? 1 : clamp(int64_t(launch.multiprocessors) * 4 / plan.blocks, 1, most);
    op.samples_of_block = divide_up(clamp(a.samples, 1, INT64_MAX), plan.blocks_y);
    plan.blocks_y = divide_up(clamp(a.samples, 1, INT64_MAX), op.samples_of_block);
    return run_plan(op, plan, launch);
  });
}

const char* sample_gaussian_backward(const SampleGaussianBackward& arguments, const Launch& launch) {
  SampleGaussianBackward a = arguments;
  align(a.grid, {&a.grad_z, &a.grad_kl, &a.mean, &a.spread, &a.grad_mean, &a.grad_spread});
  if (!a.grad_kl.data) join_rows(a.grid, {&a.grad_z, &a.mean, &a.spread, &a.grad_mean, &a.grad_spread});
  return dispatch(a.dtype, [&](auto e) {
    using Op = SampleBackwardOp<decltype(e)>;
    const int bytes = sizeof(e);
    const Op op(a);
    Packs packs = choose_sample_packs(op, {{&a.mean, bytes},
                                           {&a.spread, bytes},
                                           {&a.grad_z, bytes},
                                           {&a.grad_mean, bytes, true},
                                           {&a.grad_spread, bytes, true}});
    if (a.samples > 1 && a.grad_z_sample_stride % Op::kVector != 0) packs = {};
    return run_sample_backward(op, packs, launch);
  });
}

}  // namespace unigen::cuda
