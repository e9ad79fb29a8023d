// Terms of discriminator and generator logits: elementwise, or summed over a list of tensors in one launch.
#include "../formulas/adversarial.h"

#include "../formulas/importance.h"
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
      result[v] = weighted(x.grad.x[v] * factor, term_slope(Term(term), x.logits.template get<T>(v)));
    place.template store<E>(grad_logits, result);
  }
};

// ---- lists ---------------------------------------------------------------------------------------------------------

constexpr int kMaxItems = 22;  // of a launch: what a kernel's parameters hold
constexpr int kSums = 5;       // of the term, of 1 on the right side, of the logit, of its probability, of the slope
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
static_assert(sizeof(Items) + kMaxItems * sizeof(double) + 64 <= 4096, "a kernel has 4096 bytes of parameters");

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
  void* statistics;   // [items, columns], or null
  double scale;
  bool first;         // whether there is no earlier launch
  bool slopes;        // whether their mean is a statistic
};
constexpr int kColumns = 4;  // of the statistics of items that are not coupled

// By one block, a warp for each item: sums over its slots in order, then over the items.
template <class T, int kWidth>
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
        // of coupled items the fifth column holds what they are coupled by
        const int column = k < kColumns ? k : k + 1;
        if (result.statistics && column < kWidth && (k < kColumns || result.slopes))
          static_cast<T*>(result.statistics)[i * kWidth + column] = T(sum / double(item.numel));
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

// 1 where `x` is on the side of the edge that the term wants
template <class T>
UNIGEN_DEVICE T on_right_side(Term term, T x, T edge) {
  return (wants_positive(term) ? x > edge : x < edge) ? T(1) : T(0);
}

UNIGEN_DEVICE void keep_slot(const ListResult& result, int64_t slot, const double (&sum)[kSums]) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const double total = Group::block().reduce(sum[k], Plus());
    if (threadIdx.x == 0) result.slot_sums[slot * kSums + k] = total;
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
        T part[kColumns] = {0, 0, 0, 0};
#pragma unroll
        for (int v = 0; v < N; ++v) part[0] += term_value(item.term, x.template get<T>(v));
        if (result.statistics) {
#pragma unroll
          for (int v = 0; v < N; ++v) {
            const T l = x.template get<T>(v);
            part[1] += on_right_side(item.term, l, T(boundary(item.term)));
            part[2] += l;
            part[3] += Logistic<T>(l).sigmoid();
          }
        }
#pragma unroll
        for (int k = 0; k < kColumns; ++k) sum[k] += double(part[k]);
      },
      [&](int64_t slot) { keep_slot(result, slot, sum); });
  if (gridDim.x == 1) {
    __syncthreads();
    finish_list<T, kColumns>(items, result);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kResident)
    list_finish_kernel(const __grid_constant__ Items items, const __grid_constant__ ListResult result) {
  finish_list<T, kWidth>(items, result);
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
        for (int v = 0; v < N; ++v) slope.x[v] = static_cast<E>(weighted(factor, term_slope(item.term, x.template get<T>(v))));
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
  ListResult result{workspace, workspace + kSums, a.value, a.statistics, a.scale, true, false};
  int64_t done = 0;
  do {
    Items items;
    const int count = int(clamp(a.num_items - done, 0, kMaxItems));
    int64_t blocks = cut_items<E>(items, a.items + done, count, false, launch.multiprocessors);
    if (blocks <= 8) blocks = 1;  // which then needs no second launch
    if (const char* error = start(list_kernel<E>, blocks, 1, launch, items, result)) return error;
    if (blocks > 1) {
      if (const char* error = start(list_finish_kernel<T, kColumns>, 1, 1, launch, items, result)) return error;
    }
    done += count;
    result.first = false;
    if (result.statistics) result.statistics = static_cast<T*>(result.statistics) + count * kColumns;
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

// ---- coupled lists -------------------------------------------------------------------------------------------------

// What couples the items of a launch, the first of which is number `first` of all.
struct Link {
  void* statistics;  // [all items, kCoupledColumns]
  int64_t first, reals;
  int coupling;
  bool return_stats;

  template <class T>
  UNIGEN_DEVICE T* of(int64_t item) const {
    return static_cast<T*>(statistics) + (first + item) * kCoupledColumns;
  }
  // the statistics of what item i is coupled with
  template <class T>
  UNIGEN_DEVICE const T* with(int64_t i) const {
    return static_cast<const T*>(statistics) + coupled_with(coupling, first + i, reals) * kCoupledColumns;
  }
  UNIGEN_DEVICE Coupling of_item(int64_t i) const { return coupling_of(coupling, first + i, reals); }
};

// By one block, a warp for each item: its mean logit, or what its ratios take, from its slots' (sum, 0) or (maximum, sum).
template <class T>
UNIGEN_DEVICE void finish_summaries(const Items& items, const Link& link, const double* slot_sums) {
  Tiling tile;
  tile.lane_bits = 5;
  const Group warp(tile);
  for (int i = warp.row; i < items.count; i += kThreads / kWarp) {
    const Item& item = items.item[i];
    const int64_t end = i + 1 < items.count ? items.item[i + 1].first_slot : items.slots;
    const bool averages = Coupling(link.coupling) == Coupling::averages;
    double peak = -HUGE_VAL, sum = 0;
    if (!averages) {
      for (int64_t slot = item.first_slot + warp.lane; slot < end; slot += kWarp)
        peak = larger(peak, slot_sums[slot * kSums]);
      peak = finite_shift(warp.reduce(peak, Maximum()));
    }
    for (int64_t slot = item.first_slot + warp.lane; slot < end; slot += kWarp) {
      const double first = slot_sums[slot * kSums];
      // a slot of -inf adds nothing, but may hold a NaN
      sum += averages ? first : slot_sums[slot * kSums + 1] * (first == -HUGE_VAL ? 1 : exp(first - peak));
    }
    sum = warp.reduce(sum, Plus());
    if (warp.lane == 0) {
      T* own = link.of<T>(i);
      if (averages) {
        own[4] = T(sum / double(item.numel));
      } else {
        const bool ratios = link.of_item(i) == Coupling::ratios;
        own[4] = ratios ? T(peak) : T(0);
        own[5] = ratios ? T(inverse_sum(sum) * double(item.numel)) : T(0);
      }
    }
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    summary_kernel(const __grid_constant__ Items items, const __grid_constant__ Link link, double* slot_sums) {
  using T = Arithmetic<E>;
  T peak = -T(HUGE_VAL);
  double sum = 0;
  for_each_slot<E>(
      items,
      [&](const Item&) {
        peak = -T(HUGE_VAL);
        sum = 0;
      },
      [&](const Item&, const auto& x, int64_t) {
        constexpr int N = int(sizeof(x.x) / sizeof(E));
        T part = 0;
        if (Coupling(link.coupling) == Coupling::averages) {
#pragma unroll
          for (int v = 0; v < N; ++v) part += x.template get<T>(v);
        } else {
          T risen = peak;
#pragma unroll
          for (int v = 0; v < N; ++v) risen = larger(risen, x.template get<T>(v));
          const T shift = finite_shift(risen);
#pragma unroll
          for (int v = 0; v < N; ++v) part += exp(x.template get<T>(v) - shift);
          if (peak < risen) sum *= peak == -T(HUGE_VAL) ? 1.0 : double(exp(peak - risen));
          peak = risen;
        }
        sum += double(part);
      },
      [&](int64_t slot) {
        const bool ratios = Coupling(link.coupling) == Coupling::ratios;
        const double highest = ratios ? double(Group::block().reduce(peak, Maximum())) : 0;
        // a thread of -inf adds nothing, but may hold a NaN
        const double factor = !ratios || peak == -T(HUGE_VAL) ? 1 : exp(double(peak) - highest);
        const double total = Group::block().reduce(sum * factor, Plus());
        if (threadIdx.x == 0) {
          slot_sums[slot * kSums] = ratios ? highest : total;
          slot_sums[slot * kSums + 1] = total;
        }
      });
  if (gridDim.x == 1) {
    __syncthreads();
    finish_summaries<T>(items, link, slot_sums);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    summary_finish_kernel(const __grid_constant__ Items items, const __grid_constant__ Link link, const double* slot_sums) {
  finish_summaries<T>(items, link, slot_sums);
}

template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    coupled_kernel(const __grid_constant__ Items items, const __grid_constant__ ListResult result,
                   const __grid_constant__ Link link) {
  using T = Arithmetic<E>;
  double sum[kSums];
  T summary = 0, inverse = 0;
  Coupling coupling = Coupling::none;
  for_each_slot<E>(
      items,
      [&](const Item& item) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) sum[k] = 0;
        const int64_t i = &item - items.item;
        coupling = link.of_item(i);
        summary = link.with<T>(i)[4];
        inverse = coupling == Coupling::ratios ? link.with<T>(i)[5] : T(0);
      },
      [&](const Item& item, const auto& x, int64_t) {
        constexpr int N = int(sizeof(x.x) / sizeof(E));
        T part[kSums] = {0, 0, 0, 0, 0};
#pragma unroll
        for (int v = 0; v < N; ++v) {
          const T l = x.template get<T>(v);
          const Coupled<T> coupled(coupling, l, summary, inverse);
          part[0] += term_value(item.term, coupled.logit);
          if (coupling == Coupling::averages) part[4] += term_slope(item.term, coupled.logit);
          if (link.return_stats) {
            const T judged = coupling == Coupling::averages ? coupled.logit : l;
            part[1] += on_right_side(item.term, judged, T(0));
            part[2] += l;
            part[3] += Logistic<T>(judged).sigmoid();
          }
        }
#pragma unroll
        for (int k = 0; k < kSums; ++k) sum[k] += double(part[k]);
      },
      [&](int64_t slot) { keep_slot(result, slot, sum); });
  if (gridDim.x == 1) {
    __syncthreads();
    finish_list<T, kCoupledColumns>(items, result);
  }
}

struct Shares {
  double of[kMaxItems];  // (numel / count) of the counterpart, over the item's numel
};

template <class E>
__global__ void __launch_bounds__(kThreads, kResident)
    coupled_backward_kernel(const __grid_constant__ Items items, const __grid_constant__ Shares shares,
                            const __grid_constant__ Link link, const Arithmetic<E>* grad, double scale) {
  using T = Arithmetic<E>;
  T factor = 0, summary = 0, inverse = 0, through_mean = 0;
  Coupling coupling = Coupling::none;
  for_each_slot<E>(
      items,
      [&](const Item& item) {
        const int64_t i = &item - items.item;
        const T* with = link.with<T>(i);
        const double given = double(*grad) * scale;
        factor = T(given / item.count);
        summary = with[4];
        inverse = with[5];
        coupling = link.of_item(i);
        through_mean = coupling == Coupling::averages ? T(weighted(given, double(with[5]) * shares.of[i])) : T(0);
      },
      [&](const Item& item, const auto& x, int64_t at) {
        constexpr int N = int(sizeof(x.x) / sizeof(E));
        Pack<E, N> slope;
#pragma unroll
        for (int v = 0; v < N; ++v) {
          const Coupled<T> coupled(coupling, x.template get<T>(v), summary, inverse);
          const T inner = weighted(factor, term_slope(item.term, coupled.logit)) - through_mean;
          slope.x[v] = static_cast<E>(coupled.slope == T(0) ? T(0) : weighted(inner, coupled.slope));
        }
        E* out = static_cast<E*>(item.grad_logits) + offset<N>(item, at, item.grad_stride);
        *reinterpret_cast<Pack<E, N>*>(out) = slope;
      },
      [](int64_t) {});
}

template <class E>
const char* run_coupled(const CoupledLogitLoss& a, const Launch& launch) {
  using T = Arithmetic<E>;
  double* workspace = static_cast<double*>(launch.workspace);
  double* slot_sums = workspace + kSums;
  Items items;
  for (int64_t done = 0; done < a.num_items; done += kMaxItems) {
    const int count = int(clamp(a.num_items - done, 0, kMaxItems));
    const Link link{a.statistics, done, a.reals, a.coupling, a.return_stats};
    int64_t blocks = cut_items<E>(items, a.items + done, count, false, launch.multiprocessors);
    if (blocks <= 8) blocks = 1;
    if (const char* error = start(summary_kernel<E>, blocks, 1, launch, items, link, slot_sums)) return error;
    if (blocks > 1) {
      if (const char* error = start(summary_finish_kernel<T>, 1, 1, launch, items, link, slot_sums)) return error;
    }
  }
  const bool averages = Coupling(a.coupling) == Coupling::averages;
  ListResult result{workspace, slot_sums, a.value, a.statistics, a.scale, true, averages};
  for (int64_t done = 0; done < a.num_items; done += kMaxItems) {
    const int count = int(clamp(a.num_items - done, 0, kMaxItems));
    const Link link{a.statistics, done, a.reals, a.coupling, a.return_stats};
    int64_t blocks = cut_items<E>(items, a.items + done, count, false, launch.multiprocessors);
    if (blocks <= 8) blocks = 1;
    if (const char* error = start(coupled_kernel<E>, blocks, 1, launch, items, result, link)) return error;
    if (blocks > 1) {
      const auto finish = list_finish_kernel<T, kCoupledColumns>;
      if (const char* error = start(finish, 1, 1, launch, items, result)) return error;
    }
    result.first = false;
    result.statistics = static_cast<T*>(result.statistics) + count * kCoupledColumns;
  }
  return nullptr;
}

template <class E>
const char* run_coupled_backward(const CoupledLogitLossBackward& a, const Launch& launch) {
  for (int64_t done = 0; done < a.num_items; done += kMaxItems) {
    Items items;
    Shares shares = {};
    const int count = int(clamp(a.num_items - done, 0, kMaxItems));
    for (int i = 0; i < count; ++i) {
      const LogitItem& other = a.items[coupled_with(a.coupling, done + i, a.reals)];
      shares.of[i] = double(other.grid.cols) / other.count / double(a.items[done + i].grid.cols);
    }
    const Link link{const_cast<void*>(a.statistics), done, a.reals, a.coupling, false};
    const int64_t blocks = cut_items<E>(items, a.items + done, count, true, launch.multiprocessors);
    const auto* grad = static_cast<const Arithmetic<E>*>(a.grad);
    if (const char* error = start(coupled_backward_kernel<E>, blocks, 1, launch, items, shares, link, grad, a.scale))
      return error;
  }
  return nullptr;
}

// ---- groups --------------------------------------------------------------------------------------------------------

// How many groups there are: each sample looks for an earlier one of its label. Rows and columns are the samples.
template <class Element>
struct GroupCountOp : Problem, OpBase {
  using E = int64_t;
  using T = Arithmetic<Element>;
  using State = Sum;
  static constexpr bool kReduces = true, kTotals = true;
  static constexpr int kVector = 1, kUnroll = 4;
  template <int V>
  using Loaded = Pack<int64_t, V>;

  Operand own, label, value;
  Reduction reduction;

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return place.template load<int64_t>(label);
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At at) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!valid[u]) continue;
      const Place<R, C> place = at(u);
      if (place.col < place.rows.row && x[u].x[0] == place.rows.template at<int64_t>(own, 0)) state[0].value += 1;
    }
  }

  UNIGEN_DEVICE double finish(const Rows&, int, const State& s) const { return s.value == 0 ? 1 : 0; }
};

// Softmax among the samples of one label, by comparing each sample (a row) with each.
template <class Element>
struct GroupedOp : GroupedWeights, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  struct State {
    T maximum = -T(HUGE_VAL), sum = 0, loss = 0;

    UNIGEN_DEVICE void raise(T to) {
      const T factor = exp(maximum - finite_shift(to));
      maximum = to;
      sum *= factor;
      loss *= factor;
    }
  };
  static constexpr bool kReduces = true, kTotals = true;
  static constexpr int kVector = 1, kUnroll = 4;

  template <int V>
  struct Loaded {
    Pack<E, V> logit;
    Pack<int64_t, V> label;
  };

  Operand own, own_label;
  Reduction reduction;
  const T* groups;  // how many: one number

  explicit GroupedOp(const GroupedWeights& a) : GroupedWeights(a) {}

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<E>(logits), place.template load<int64_t>(labels)};
  }

  template <int R, int C, int U, class At>
  UNIGEN_DEVICE void batch(State (&state)[R], const Loaded<R * C> (&x)[U], const bool (&valid)[U], At at) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!valid[u]) continue;
      if (x[u].label.x[0] != at(u).rows.template at<int64_t>(own_label, 0)) continue;
      const T l = x[u].logit.template get<T>(0), t = l / T(temperature);
      state[0].raise(larger(state[0].maximum, t));
      const T e = exp(t - finite_shift(state[0].maximum));
      state[0].sum += e;
      state[0].loss += weighted(e, softplus(-l));
    }
  }

  UNIGEN_DEVICE void reduce(State& s, const Group& group) const {
    s.raise(group.reduce(s.maximum, Maximum()));
    s.sum = group.reduce(s.sum, Plus());
    s.loss = group.reduce(s.loss, Plus());
  }
  UNIGEN_DEVICE void merge(State& s, State other) const {
    const T maximum = larger(s.maximum, other.maximum);
    s.raise(maximum);
    other.raise(maximum);
    s.sum += other.sum;
    s.loss += other.loss;
  }

  UNIGEN_DEVICE double finish(const Rows& rows, int r, const State& s) const {
    const T l = static_cast<T>(rows.at<E>(own, r)), inverse = inverse_sum(s.sum);
    const T weight = exp(l / T(temperature) - finite_shift(s.maximum)) * inverse;
    const T factor = mean ? T(1) / *groups : T(1);
    T* weights = static_cast<T*>(statistics);
    weights[rows.row + r] = weight;
    weights[grid.rows + rows.row + r] = s.loss * inverse;
    if (rows.row + r == 0) weights[2 * grid.rows] = factor;
    return double(weighted(weight, softplus(-l))) * double(factor);
  }

  Operand value;
};

template <class Element>
struct GroupedBackwardOp : GroupedWeightsBackward, OpBase {
  using E = Element;
  using T = Arithmetic<E>;
  using Row = NoState;
  static constexpr bool kWrites = true;
  static constexpr int kVector = kWidest<E>, kUnroll = 2;

  T inverse_temperature;

  explicit GroupedBackwardOp(const GroupedWeightsBackward& a)
      : GroupedWeightsBackward(a), inverse_temperature(T(1 / a.temperature)) {}

  template <int V>
  struct Loaded {
    Pack<E, V> logits;
    Pack<T, V> weights, losses;
  };

  template <int R, int C>
  UNIGEN_DEVICE Loaded<R * C> load(const Place<R, C>& place) const {
    return {place.template load<E>(logits), place.template load<T>(weights), place.template load<T>(losses)};
  }

  UNIGEN_DEVICE Row context(const Rows&, int, NoState) const { return {}; }

  template <int R, int C>
  UNIGEN_DEVICE void write(const Place<R, C>& place, const Row (&)[R], const Loaded<R * C>& x) const {
    const T given = *static_cast<const T*>(grad) * *static_cast<const T*>(factor);
    T result[R * C];
#pragma unroll
    for (int v = 0; v < R * C; ++v)
      result[v] = weighted(given, iwgan_slope(x.logits.template get<T>(v), x.weights.x[v], detach, x.losses.x[v], inverse_temperature));
    place.template store<E>(grad_logits, result);
  }
};

// an operand of n columns as one of n rows
Operand along_rows(const Operand& columns) {
  Operand rows;
  rows.data = columns.data;
  for (int d = 0; d < kMaxDims; ++d) rows.row[d] = columns.col[d];
  return rows;
}

template <class E>
const char* run_grouped(const GroupedWeights& arguments, const Launch& launch) {
  using T = Arithmetic<E>;
  GroupedWeights a = arguments;
  align(a.grid, {&a.logits, &a.labels});
  a.grid.rows = a.grid.cols;
  a.grid.row_dims = a.grid.col_dims;
  for (int d = 0; d < kMaxDims; ++d) a.grid.row_size[d] = a.grid.col_size[d];
  GroupCountOp<E> count;
  count.grid = a.grid;
  count.label = a.labels;
  count.own = along_rows(a.labels);
  count.value.data = a.workspace;
  count.reduction = {true, 1, 1};
  if (const char* error = run_rows(count, {{&count.label, sizeof(int64_t)}}, launch, true)) return error;
  GroupedOp<E> op(a);
  op.own = along_rows(a.logits);
  op.own_label = count.own;
  op.groups = static_cast<const T*>(a.workspace);
  op.value.data = a.value;
  op.reduction = {true, a.mean && a.grid.cols == 0 ? double(NAN) : 1.0, 1};
  return run_rows(op, {{&op.logits, sizeof(E)}}, launch, true);
}

}  // namespace

const char* logit_loss(const LogitLoss& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_list<decltype(e)>(a, launch); });
}

const char* logit_loss_backward(const LogitLossBackward& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_list_backward<decltype(e)>(a, launch); });
}

const char* coupled_logit_loss(const CoupledLogitLoss& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_coupled<decltype(e)>(a, launch); });
}

const char* coupled_logit_loss_backward(const CoupledLogitLossBackward& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_coupled_backward<decltype(e)>(a, launch); });
}

const char* grouped_weights(const GroupedWeights& a, const Launch& launch) {
  return dispatch(a.dtype, [&](auto e) { return run_grouped<decltype(e)>(a, launch); });
}

const char* grouped_weights_backward(const GroupedWeightsBackward& arguments, const Launch& launch) {
  GroupedWeightsBackward a = arguments;
  align(a.grid, {&a.logits, &a.weights, &a.losses, &a.grad_logits});
  return dispatch(a.dtype, [&](auto e) {
    using T = Arithmetic<decltype(e)>;
    return run_rows(GroupedBackwardOp<decltype(e)>(a),
                    {{&a.logits, sizeof(e)}, {&a.weights, sizeof(T)}, {&a.losses, sizeof(T)},
                     {&a.grad_logits, sizeof(e), true}},
                    launch);
  });
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
