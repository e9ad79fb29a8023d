// Whole bounds, from what the decoder gave to the loss and its gradients: what those of one sample and of several share.
#pragma once

#include "../formulas/objectives.h"

#include <type_traits>

#include "rows.cuh"

namespace unigen::cuda {

constexpr int64_t kWindow = 1024;  // rows whose coefficients are in shared memory

// Which gradients are wanted.
struct Wanted {
  bool of_elements = false, of_shared = false, of_latent = false;

  explicit Wanted(const ObjectiveTensors& a) {
    for (int k = 0; k < kMaxDecoderOutputs; ++k) {
      of_elements = of_elements || (a.grad_decoder[k].data && !a.shared[k]);
      of_shared = of_shared || (a.grad_decoder[k].data && a.shared[k]);
    }
    for (const Operand* o : {&a.grad_mean, &a.grad_logvar, &a.grad_prior_mean, &a.grad_prior_logvar})
      of_latent = of_latent || o->data;
  }
};

// What both ops do with the numbers of the event and of the latent. Op is derived from this and from its arguments.
template <class Op, class Element, class Density>
struct ObjectiveOp : OpBase {
  using E = Element;
  using F = Density;
  using T = Arithmetic<E>;
  static constexpr int kOutputs = F::kInputs - 1;
  // a large formula, or one in double, takes longer than its loads
  static constexpr int kVector = F::kLarge || sizeof(T) == 8 ? 1 : kWidest<E>;
  static constexpr int kUnroll = F::kLarge || kVector == 8 ? 1 : 2;
  static constexpr bool kRowPacks = false;
  template <int V>
  struct Loaded {
    Pack<E, V> in[F::kInputs];

    UNIGEN_DEVICE void numbers(int v, T (&x)[F::kInputs]) const {
#pragma unroll
      for (int k = 0; k < F::kInputs; ++k) x[k] = in[k].template get<T>(v);
    }
  };
  F density;

  explicit ObjectiveOp(const F& density) : density(density) {}

  UNIGEN_DEVICE const ObjectiveTensors& tensors() const { return static_cast<const Op&>(*this); }

  // ---- the event ----

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    Loaded<R * C> loaded;
    loaded.in[0] = place.template load<E>(tensors().x);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) loaded.in[k + 1] = place.template load<E>(tensors().decoder[k]);
    return loaded;
  }

  // log-likelihood of the elements of a batch
  struct Likelihood {
    T sum = 0, product = 0;  // of Bernoulli's factors 1 + tail, minus 1: one logarithm for all of them

    UNIGEN_DEVICE void add(const F& density, const T (&in)[F::kInputs]) {
      if constexpr (std::is_same<F, BernoulliDensity>::value) {
        const BernoulliTerms<T> terms(in[1], in[0]);
        sum = terms.less_linear(sum);
        product += terms.tail + product * terms.tail;
      } else {
        sum += density.value(in);
      }
    }
    UNIGEN_DEVICE T total() const { return std::is_same<F, BernoulliDensity>::value ? sum - log1p(product) : sum; }
  };

  template <int C, int U>
  UNIGEN_DEVICE T log_prob(const Loaded<C> (&given)[U], const bool (&valid)[U]) const {
    static_assert(U * C <= 96, "the product of the factors, each at most 2, overflows");
    Likelihood likelihood;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (!valid[u]) continue;
        T in[F::kInputs];
        given[u].numbers(c, in);
        likelihood.add(density, in);
      }
    }
    return likelihood.total();
  }

  // coefficient · slopes of a pack; each of its elements goes to `also`, too
  template <int C, class Also>
  UNIGEN_DEVICE void write_slopes(const Place<1, C>& place, T coefficient, const Loaded<C>& given, const Also& also) const {
    T result[F::kInputs][C];
#pragma unroll
    for (int v = 0; v < C; ++v) {
      T in[F::kInputs], out[F::kInputs];
      given.numbers(v, in);
      also(in);
      density.slopes(in, out);
#pragma unroll
      for (int k = 1; k < F::kInputs; ++k) result[k][v] = weighted(coefficient, out[k]);
    }
    const ObjectiveTensors& a = tensors();
#pragma unroll
    for (int k = 0; k < kOutputs; ++k)
      if (a.grad_decoder[k].data && !a.shared[k]) place.template store<E>(a.grad_decoder[k], result[k + 1]);
  }

  // of one element: the gradients of outputs that all rows share
  UNIGEN_DEVICE void add_shared(const Place<1, 1>& place, T coefficient, double (&sums)[kOutputs]) const {
    T in[F::kInputs], out[F::kInputs];
    load(place).numbers(0, in);
    density.slopes(in, out);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) sums[k] += double(weighted(coefficient, out[k + 1]));
  }

  // ---- the latent, whose elements may be of another type ----

  // 0 where absent
  UNIGEN_DEVICE T number(const Operand& o, const Place<1, 1>& at) const {
    if (!o.data) return 0;
    const DType dtype = tensors().latent_dtype;
    if constexpr (sizeof(T) == 8) {
      return static_cast<const double*>(o.data)[at.offset(o)];
    } else if (dtype == DType::bfloat16) {
      return T(static_cast<const __nv_bfloat16*>(o.data)[at.offset(o)]);
    } else if (dtype == DType::float16) {
      return T(static_cast<const __half*>(o.data)[at.offset(o)]);
    }
    return T(static_cast<const float*>(o.data)[at.offset(o)]);
  }

  UNIGEN_DEVICE void put(const Operand& o, const Place<1, 1>& at, T value) const {
    const DType dtype = tensors().latent_dtype;
    if constexpr (sizeof(T) == 8) {
      static_cast<double*>(o.data)[at.offset(o)] = value;
    } else if (dtype == DType::bfloat16) {
      static_cast<__nv_bfloat16*>(o.data)[at.offset(o)] = static_cast<__nv_bfloat16>(value);
    } else if (dtype == DType::float16) {
      static_cast<__half*>(o.data)[at.offset(o)] = static_cast<__half>(value);
    } else {
      static_cast<float*>(o.data)[at.offset(o)] = value;
    }
  }
};

template <class Op>
Packs event_packs(const Op& op) {
  constexpr int bytes = sizeof(typename Op::E);
  const Operand absent{};
  const auto gradient = [&](int k) { return Element{op.shared[k] ? &absent : &op.grad_decoder[k], bytes, true}; };
  return choose_packs<Op>(op.grid, {{&op.x, bytes},
                                    {&op.decoder[0], bytes},
                                    {&op.decoder[1], bytes},
                                    {&op.decoder[2], bytes},
                                    gradient(0),
                                    gradient(1),
                                    gradient(2)});
}

// ---- gradients of what all rows share ------------------------------------------------------------------------------

// 32 columns beside each other, by a warp; the warps of a block share the rows
UNIGEN_DEVICE Group column_group() {
  Tiling tile;
  tile.transposed = true;
  static_assert(kThreads == 256, "lane_bits");
  tile.lane_bits = 3;
  return Group(tile);
}

// Gradients of what all rows share: their sums, of a part of the rows in the workspace if there are several. This reads the
// numbers once more; blocks of the other kernels would have to keep a sum of every column. `groups`: for fill_window.
template <class Op>
__global__ void __launch_bounds__(kThreads, kResidentOf<Op>)
    shared_slopes_kernel(const __grid_constant__ Op op, const __grid_constant__ Tiling groups, double* partial, int64_t parts) {
  using T = typename Op::T;
  __shared__ T coefficients[kWindow];
  const Group columns = column_group();
  const int64_t first = int64_t(blockIdx.x) * kWarp, part = blockIdx.y;
  const bool live = first + columns.row < op.grid.cols;
  const int64_t col = live ? first + columns.row : 0, end = op.grid.rows * (part + 1) / parts;
  double sums[Op::kOutputs] = {};
  for (int64_t row = op.grid.rows * part / parts; row < end;) {
    Rows from;
    __syncthreads();
    const int64_t count = op.fill_window(row, end, groups, coefficients, from);
    __syncthreads();
    for (int64_t k = columns.lane; live && k < count; k += columns.lanes)
      op.add_shared(Place<1, 1>(op.row_of_window(from, k), col, op.grid), coefficients[k], sums);
    row += count;
  }
#pragma unroll
  for (int k = 0; k < Op::kOutputs; ++k) {
    if (!op.grad_decoder[k].data || !op.shared[k]) continue;
    const double sum = columns.reduce(sums[k], Plus());
    if (!live || columns.lane != 0) continue;
    if (parts > 1) {
      partial[(part * Op::kOutputs + k) * op.grid.cols + col] = sum;
    } else {
      Place<1, 1>(Rows{}, col, op.grid).template store<typename Op::E>(op.grad_decoder[k], {T(sum)});
    }
  }
}

// the parts' sums, a thread for each column
template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    merge_shared_kernel(const __grid_constant__ ObjectiveTensors a, int outputs, const double* partial, int64_t parts) {
  using T = Arithmetic<E>;
  const int64_t col = int64_t(blockIdx.x) * kThreads + threadIdx.x, cols = a.grid.cols;
  if (col >= cols) return;
  const Place<1, 1> place(Rows{}, col, a.grid);
  for (int k = 0; k < outputs; ++k) {
    if (!a.grad_decoder[k].data || !a.shared[k]) continue;
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[(part * outputs + k) * cols + col];
    place.store<E>(a.grad_decoder[k], {T(sum)});
  }
}

template <class Op>
const char* run_shared_slopes(const Op& op, const Tiling& groups, const Launch& launch) {
  const int64_t cols = op.grid.cols, tiles = divide_up(cols, kWarp);
  if (cols == 0) return nullptr;
  const int64_t room = kWorkspaceBytes / int64_t(sizeof(double)) / (Op::kOutputs * cols);
  const int64_t wanted = clamp(divide_up(int64_t(launch.multiprocessors) * 4, tiles), 1, divide_up(op.grid.rows, kWarp));
  const int64_t parts = clamp(wanted, 1, room);
  double* const partial = static_cast<double*>(launch.workspace);
  const char* error = start(shared_slopes_kernel<Op>, tiles, parts, launch, op, groups, partial, parts);
  if (error || parts == 1) return error;
  const ObjectiveTensors& a = op;
  return start(merge_shared_kernel<typename Op::E>, divide_up(cols, kThreads), 1, launch, a, Op::kOutputs,
               static_cast<const double*>(partial), parts);
}

}  // namespace unigen::cuda
