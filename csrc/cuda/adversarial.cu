// Terms of discriminator and generator logits: elementwise, or summed over a list of tensors in one launch.
#include "../formulas/adversarial.h"

#include "rows.cuh"

namespace unigen::cuda {
namespace {

// ---- elementwise ---------------------------------------------------------------------------------------------------

template <class Element>
struct LogitTermOp : LogitTerm, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using Row = NoState;
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = sizeof(E) == 2 ? 2 : 4;
  template <int V>
  using Loaded = Pack<E, V>;

  T factor;

  explicit LogitTermOp(const LogitTerm& a) : LogitTerm(a), factor(T(a.scale)) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return place.template load<E>(logits);
  }

  UNIGEN_DEVICE Row context(const Rows&, int, NoState) const { return {}; }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&)[R], const Loaded<R * C>& x) const {
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v) result[v] = factor * term_value(Term(term), x.template get<T>(v));
    place.template store<T>(out, result);
  }
};

template <class Element>
struct LogitTermBackwardOp : LogitTermBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using Row = NoState;
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = 2;

  T factor;

  explicit LogitTermBackwardOp(const LogitTermBackward& a) : LogitTermBackward(a), factor(T(a.scale)) {}

  template <int V>
  struct Loaded {
    Pack<T, V> grad;
    Pack<E, V> logits;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<T>(grad), place.template load<E>(logits)};
  }

  UNIGEN_DEVICE Row context(const Rows&, int, NoState) const { return {}; }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&)[R], const Loaded<R * C>& x) const {
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v)
      result[v] = x.grad.x[v] * factor * term_slope(Term(term), x.logits.template get<T>(v));
    place.template store<E>(grad_logits, result);
  }
};

// ---- lists ---------------------------------------------------------------------------------------------------------

constexpr int kMaxItems = 24;  // of a launch: what a kernel's parameters hold
constexpr int kSums = 4;       // of the term, of 1 on the right side of 0, of the logit, of its probability
constexpr int kItemUnroll = 4;
constexpr int64_t kMaxSlots = kWorkspaceBytes / int64_t(sizeof(double)) / kSums - 1;

struct Item {
  const void* logits;
  void* grad_logits;
  int64_t size[kMaxDims], stride[kMaxDims], grad_stride[kMaxDims];
  int64_t numel;
  int64_t packed;      // so many elements from the first on are read 16 bytes at a time
  int64_t first_slot;  // an item is cut into slots, each the work of one block
  int64_t slot_size;   // in elements
  double count;
  int dims;  // of size and the strides, from the innermost
  Term term;
};

struct Items {
  Item item[kMaxItems];
  int64_t slots;
  int count;
};
static_assert(sizeof(Items) + 64 <= 4096, "a kernel has 4096 bytes of parameters");

// Where an element is; N > 1: it begins a pack, of an item without gaps.
template <int N>
UNIGEN_DEVICE int64_t offset(const Item& item, int64_t at, const int64_t (&stride)[kMaxDims]) {
  return N > 1 ? at : dot(split(at, item.dims, item.size), stride);
}

// A block's share of an item: visit(pack, first element), with all loads of a batch under way before the first visit.
template <class E, int N, class Visit>
UNIGEN_DEVICE void sweep(const Item& item, int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t step = int64_t(kThreads) * N;
  const E* logits = static_cast<const E*>(item.logits);
  for (int64_t i = begin + int64_t(threadIdx.x) * N; i < end; i += step * kItemUnroll) {
    Pack<E, N> x[kItemUnroll];
#pragma unroll
    for (int u = 0; u < kItemUnroll; ++u) {
      const int64_t at = i + u * step;
      if (at < end) x[u] = *reinterpret_cast<const Pack<E, N>*>(logits + offset<N>(item, at, item.stride));
    }
#pragma unroll
    for (int u = 0; u < kItemUnroll; ++u)
      if (i + u * step < end) visit(x[u], i + u * step);
  }
}

// The blocks take slots in turn: start(item), then visit(item, pack, first element), then stop(slot).
template <class E, class Start, class Visit, class Stop>
UNIGEN_DEVICE void for_each_slot(const Items& items, Start start, Visit visit, Stop stop) {
  for (int64_t slot = blockIdx.x; slot < items.slots; slot += gridDim.x) {
    int i = 0;
    while (i + 1 < items.count && slot >= items.item[i + 1].first_slot) ++i;
    const Item& item = items.item[i];
    const int64_t begin = (slot - item.first_slot) * item.slot_size;
    const int64_t end = begin + item.slot_size < item.numel ? begin + item.slot_size : item.numel;
    const int64_t packed_end = end < item.packed ? end : item.packed;
    start(item);
    const int64_t rest_begin = begin > item.packed ? begin : item.packed;
    const auto each = [&](const auto& x, int64_t at) { visit(item, x, at); };
    sweep<E, kWidest<E>>(item, begin, packed_end, each);
    sweep<E, 1>(item, rest_begin, end, each);
    stop(slot);
  }
}

struct ListResult {
  double* running;    // the sum over the items of earlier launches
  double* slot_sums;  // [slots, kSums]
  void* value;
  void* statistics;   // [items, kSums], or null
  double scale;
  bool first;         // whether there is no earlier launch
};

// By one block, a warp for each item: sums over its slots in order, then over the items.
template <class T>
UNIGEN_DEVICE void finish_list(const Items& items, const ListResult& result) {
  __shared__ double values[kMaxItems];
  Tiling tile;
  tile.lane_bits = 5;
  const Group warp(tile);
  for (int i = warp.row; i < items.count; i += kThreads / kWarp) {
    const Item& item = items.item[i];
    const int64_t end = i + 1 < items.count ? items.item[i + 1].first_slot : items.slots;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      double sum = 0;
      for (int64_t slot = item.first_slot + warp.lane; slot < end; slot += kWarp)
        sum += result.slot_sums[slot * kSums + k];
      sum = warp.reduce(sum, Plus());
      if (warp.lane == 0) {
        if (k == 0) values[i] = sum / item.count;
        if (result.statistics) static_cast<T*>(result.statistics)[i * kSums + k] = T(sum / double(item.numel));
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = result.first ? 0 : *result.running;
    for (int i = 0; i < items.count; ++i) total += values[i];
    *result.running = total;
    *static_cast<T*>(result.value) = T(total * result.scale);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    list_kernel(const __grid_constant__ Items items, const __grid_constant__ ListResult result) {
  using T = Arithmetic<E>;
  double sum[kSums];
  for_each_slot<E>(
      items,
      [&](const Item&) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) sum[k] = 0;
      },
      [&](const Item& item, const auto& x, int64_t) {
        constexpr int N = int(sizeof(x.x) / sizeof(E));
        T part[kSums] = {0, 0, 0, 0};
#pragma unroll
        for (int v = 0; v < N; ++v) part[0] += term_value(item.term, x.template get<T>(v));
        if (result.statistics) {
          const bool positive = wants_positive(item.term);
#pragma unroll
          for (int v = 0; v < N; ++v) {
            const T l = x.template get<T>(v);
            part[1] += (positive ? l > T(0) : l < T(0)) ? T(1) : T(0);
            part[2] += l;
            part[3] += Logistic<T>(l).sigmoid();
          }
        }
#pragma unroll
        for (int k = 0; k < kSums; ++k) sum[k] += double(part[k]);
      },
      [&](int64_t slot) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
          const double total = Group::block().reduce(sum[k], Plus());
          if (threadIdx.x == 0) result.slot_sums[slot * kSums + k] = total;
        }
      });
  if (gridDim.x == 1) {
    __syncthreads();
    finish_list<T>(items, result);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    list_finish_kernel(const __grid_constant__ Items items, const __grid_constant__ ListResult result) {
  finish_list<T>(items, result);
}

template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    list_backward_kernel(const __grid_constant__ Items items, const Arithmetic<E>* grad, double scale) {
  using T = Arithmetic<E>;
  T factor = 0;
  for_each_slot<E>(
      items, [&](const Item& item) { factor = T(double(*grad) * scale / item.count); },
      [&](const Item& item, const auto& x, int64_t at) {
        constexpr int N = int(sizeof(x.x) / sizeof(E));
        Pack<E, N> slope;
#pragma unroll
        for (int v = 0; v < N; ++v) slope.x[v] = static_cast<E>(factor * term_slope(item.term, x.template get<T>(v)));
        E* out = static_cast<E*>(item.grad_logits) + offset<N>(item, at, item.grad_stride);
        *reinterpret_cast<Pack<E, N>*>(out) = slope;
      },
      [](int64_t) {});
}

// Describes the items from `given` on and cuts them into slots; returns how many blocks shall take them.
template <class E>
int64_t cut_items(Items& items, const LogitItem* given, int count, bool backward, int multiprocessors) {
  constexpr int V = kWidest<E>;
  constexpr int64_t batch = int64_t(kThreads) * kItemUnroll;
  int64_t width[kMaxItems], batches = 0;
  for (int i = 0; i < count; ++i) {
    LogitItem a = given[i];
    align(a.grid, {&a.logits, &a.grad_logits});
    Item& item = items.item[i];
    item.logits = a.logits.data;
    item.grad_logits = a.grad_logits.data;
    for (int d = 0; d < kMaxDims; ++d) {
      item.size[d] = a.grid.col_size[d];
      item.stride[d] = a.logits.col[d];
      item.grad_stride[d] = a.grad_logits.col[d];
    }
    item.numel = a.grid.cols;
    item.count = a.count;
    item.dims = a.grid.col_dims;
    item.term = Term(a.term);
    const auto contiguous = [&](const Operand& o) {
      return o.col[kInnermost] == 1 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
    };
    const bool packs = V > 1 && item.size[kInnermost] == item.numel && contiguous(a.logits) &&
                       (!backward || contiguous(a.grad_logits));
    item.packed = packs ? item.numel / V * V : 0;
    width[i] = packs ? V : 1;
    batches += divide_up(item.numel, batch * width[i]);
  }
  // a block takes as many batches of each item as keeps the number of slots within what the device and workspace hold
  const int64_t most = clamp(int64_t(multiprocessors) * 16, 1, kMaxSlots - kMaxItems);
  const int64_t per_slot = clamp(divide_up(batches, most), 1, INT64_MAX);
  items.slots = 0;
  items.count = count;
  for (int i = 0; i < count; ++i) {
    Item& item = items.item[i];
    item.first_slot = items.slots;
    item.slot_size = batch * width[i] * per_slot;
    items.slots += clamp(divide_up(item.numel, item.slot_size), 1, kMaxSlots);
  }
  return items.slots;
}

template <class E>
const char* run_list(const LogitLoss& a, const Launch& launch) {
  using T = Arithmetic<E>;
  double* workspace = static_cast<double*>(launch.workspace);
  ListResult result{workspace, workspace + kSums, a.value, a.statistics, a.scale, true};
  int64_t done = 0;
  do {
    Items items;
    const int count = int(clamp(a.num_items - done, 0, kMaxItems));
    int64_t blocks = cut_items<E>(items, a.items + done, count, false, launch.multiprocessors);
    if (blocks <= 8) blocks = 1;  // which then needs no second launch
    if (const char* error = start(list_kernel<E>, blocks, 1, launch, items, result)) return error;
    if (blocks > 1) {
      if (const char* error = start(list_finish_kernel<T>, 1, 1, launch, items, result)) return error;
    }
    done += count;
    result.first = false;
    if (result.statistics) result.statistics = static_cast<T*>(result.statistics) + count * kSums;
  } while (done < a.num_items);
  return nullptr;
}

template <class E>
const char* run_list_backward(const LogitLossBackward& a, const Launch& launch) {
  for (int64_t done = 0; done < a.num_items; done += kMaxItems) {
    Items items;
    const int count = int(clamp(a.num_items - done, 0, kMaxItems));
    const int64_t blocks = cut_items<E>(items, a.items + done, count, true, launch.multiprocessors);
    const auto* grad = static_cast<const Arithmetic<E>*>(a.grad);
    if (const char* error = start(list_backward_kernel<E>, blocks, 1, launch, items, grad, a.scale)) return error;
  }
  return nullptr;
}

}  // namespace

const char* logit_loss(const LogitLoss& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_list<decltype(e)>(a, launch); });
}

const char* logit_loss_backward(const LogitLossBackward& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_list_backward<decltype(e)>(a, launch); });
}

const char* logit_term(const LogitTerm& arguments, const Launch& launch) {
  LogitTerm a = arguments;
  align(a.grid, {&a.logits, &a.out});
  return dispatch(a.dtype, [&](auto e) {
    using T = Arithmetic<decltype(e)>;
    return run_rows(LogitTermOp<decltype(e)>(a), {{&a.logits, sizeof(e)}, {&a.out, sizeof(T), true}}, launch);
  });
}

const char* logit_term_backward(const LogitTermBackward& arguments, const Launch& launch) {
  LogitTermBackward a = arguments;
  align(a.grid, {&a.grad, &a.logits, &a.grad_logits});
  return dispatch(a.dtype, [&](auto e) {
    using T = Arithmetic<decltype(e)>;
    return run_rows(LogitTermBackwardOp<decltype(e)>(a),
                    {{&a.logits, sizeof(e)}, {&a.grad, sizeof(T)}, {&a.grad_logits, sizeof(e), true}}, launch);
  });
}

}  // namespace unigen::cuda
