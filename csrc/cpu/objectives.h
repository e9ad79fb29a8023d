// The drivers of whole bounds: sums over the event of what the decoder gave, and gradients; how threads share examples.
#pragma once

#include "../formulas/objectives.h"

#include <memory>
#include <type_traits>
#include <vector>

#include "densities.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

constexpr int64_t kFewExamples = 16;         // with fewer, threads share the rows of an example
constexpr int64_t kSharedUnits = 64;         // where a gradient is summed over all rows, each unit has a sum of its own
constexpr int64_t kCacheBytes = 3 << 19;     // of an example's numbers and gradients that stay in a core's cache
constexpr int64_t kPieceCols = 1 << 15;      // of a long row that threads share

// ---- over the event --------------------------------------------------------------------------------------------------

// What is summed of a formula F over a row, to more digits than T has: state 0 is added up in double every few vectors; the
// others belong to one stretch of the row, at whose end `close` adds them, of all ways. With kSlopes, the slopes come along.
template <class F>
struct DensitySum {
  static constexpr int kStates = 1;
  F formula;

  template <bool kSlopes, class V>
  UNIGEN_INLINE void add(V* state, const V* in, V* slopes) const {
    state[0] = state[0] + value_of(formula, in);
    if constexpr (kSlopes) slopes_of(formula, in, slopes);
  }
  template <int kWays, class V>
  UNIGEN_INLINE void close(V (&)[kWays][kStates], WideSum<Scalar<V>>&) const {}
};

template <>
struct DensitySum<BernoulliDensity> : BernoulliSum {
  BernoulliDensity formula;

  UNIGEN_INLINE explicit DensitySum(BernoulliDensity formula) : formula(formula) {}

  template <bool kSlopes, class V>
  UNIGEN_INLINE void add(V* state, const V* in, V* slopes) const {
    const BernoulliTerms<V> terms(in[1], in[0]);
    state[0] = terms.less_linear(state[0]);
    multiply(state[1], terms.tail);
    if constexpr (kSlopes) slopes[1] = terms.slope();
  }
  // -log of the product, its exponents apart
  template <int kWays, class V>
  UNIGEN_INLINE void close(V (&state)[kWays][kStates], WideSum<Scalar<V>>& sum) const {
    for (int way = 1; way < kWays; ++way) multiply(state[0][1], state[way][1]);
    const V product = constant<V>(1) + state[0][1], lost = state[0][1] - (product - constant<V>(1));
    const LogParts<Scalar<V>> parts(product);
    sum.add(parts.n, -0.69314718055994530942);
    sum.add(-(parts.f + log_correction(parts.f) + lost / product));
  }
};

// The rows of log p(x | decoder): F takes x, then what the decoder gave.
template <class T, class F>
class Density {
  using V = Vec<T>;
  static constexpr int kIn = F::kInputs, kOut = kIn - 1;
  static constexpr int kStretch = kFlush * V::size;

 public:
  // whether the slopes come so cheaply with the value that they are better kept than computed again
  static constexpr bool kKeeps = std::is_same_v<F, BernoulliDensity>;

  Density(const ObjectiveTensors& a, int64_t samples, const F& formula) : sum_{formula}, cols_(a.grid.cols) {
    in_[0] = Stream<T>(a.grid, elements(a.x, a), Axis::rows, Axis::cols);
    keeps_ = kKeeps && samples * a.grid.cols * kOut * int64_t(2 * sizeof(T)) <= kCacheBytes;
    for (int k = 0; k < kOut; ++k) {
      in_[k + 1] = Stream<T>(a.grid, elements(a.decoder[k], a), Axis::rows, Axis::cols);
      out_[k] = Stream<T>(a.grid, elements(a.grad_decoder[k], a), Axis::rows, Axis::cols);
      wanted_[k] = a.grad_decoder[k].data;
      shared_[k] = wanted_[k] && a.shared[k];
      any_ = any_ || wanted_[k];
      sums_ += shared_[k];
      keeps_ = keeps_ && out_[k].direct() && !shared_[k];
    }
  }

  bool any() const { return any_; }
  bool keeps() const { return keeps_; }
  int sums() const { return sums_; }  // gradients that are summed over all rows

  // of columns [begin, end) of a row; `keep`: the slopes are left where the gradient is to be
  double value(int64_t row, int64_t begin, int64_t end, bool keep) const {
    if constexpr (kKeeps) {
      if (keep) return swept<true, Slopes::as_they_are>(row, begin, end);
    }
    return swept<true, Slopes::none>(row, begin, end);
  }

  // Gradients of columns [begin, end) of a row. totals[k]: what output k has summed over the rows so far, if it is shared.
  void gradients(int64_t row, int64_t begin, int64_t end, T coefficient, T* const* totals) const {
    if (coefficient == 0) return no_gradients(row, begin, end);  // and the slopes may be infinite
    swept<false, Slopes::scaled>(row, begin, end, coefficient, totals);
  }

  // both in one sweep
  double value_and_gradients(int64_t row, int64_t begin, int64_t end, T coefficient, T* const* totals) const {
    if (coefficient != 0) return swept<true, Slopes::scaled>(row, begin, end, coefficient, totals);
    no_gradients(row, begin, end);
    return value(row, begin, end, false);
  }

  // What was kept, times the coefficient.
  UNIGEN_NOINLINE void scale(int64_t row, T coefficient) const {
    const V factor(coefficient);
    for (int k = 0; k < kOut; ++k) {
      T* target = out_[k].target(out_[k].origin(row), 0, cols_, nullptr);
      if (coefficient == 0) {
        for (int64_t c = 0; c < cols_; ++c) target[c] = 0;
        continue;
      }
      for (int64_t c = 0; c < cols_; c += kChunk<T>) {
        for_vectors<T>(int(smaller(kChunk<T>, cols_ - c)), [&](int i, auto l) UNIGEN_FORCED {
          store(target + c + i, factor * load(target + c + i, l), l);
        });
      }
    }
  }

  // Room for the sums of one unit: totals[k] points into it.
  std::unique_ptr<T[]> sums_room(T** totals) const {
    std::unique_ptr<T[]> room(sums_ ? new T[sums_ * cols_]() : nullptr);
    for (int k = 0, at = 0; k < kOut; ++k) totals[k] = shared_[k] ? room.get() + cols_ * at++ : nullptr;
    return room;
  }

  // The gradients of the shared outputs from `units` such rooms.
  void write_sums(const std::vector<std::unique_ptr<T[]>>& units) const {
    std::vector<T> total(cols_);
    for (int k = 0, at = 0; k < kOut; ++k) {
      if (!shared_[k]) continue;
      for (int64_t c = 0; c < cols_; ++c) {
        double sum = 0;
        for (const auto& unit : units) sum += unit[cols_ * at + c];
        total[c] = T(sum);
      }
      for (int64_t c = 0; c < cols_; c += kChunk<T>) out_[k].write(0, c, smaller(kChunk<T>, cols_ - c), total.data() + c);
      ++at;
    }
  }

 private:
  UNIGEN_NOINLINE void no_gradients(int64_t row, int64_t begin, int64_t end) const {
    constexpr T zeros[kChunk<T>] = {};
    for (int k = 0; k < kOut; ++k) {
      if (!wanted_[k] || shared_[k]) continue;
      const int64_t origin = out_[k].origin(row);
      for (int64_t c = begin; c < end; c += kChunk<T>) out_[k].write(origin, c, smaller(kChunk<T>, end - c), zeros);
    }
  }

  enum class Slopes { none, as_they_are, scaled };

  template <bool kValues, Slopes kWritten>
  UNIGEN_NOINLINE double swept(int64_t row, int64_t begin, int64_t end, T coefficient = 0, T* const* totals = nullptr) const {
    constexpr bool kSlopes = kWritten != Slopes::none;
    constexpr int kWays = kValues ? 2 : 1;  // sums that do not wait for one another
    constexpr int kBlock = kValues ? 8 * kWays * V::size : kStretch;  // elements that are added up in T
    constexpr int kStates = DensitySum<F>::kStates;
    alignas(kVectorBytes) T room[kIn + (kSlopes ? kOut : 0)][kStretch];
    const DensitySum<F> sum = sum_;
    const V factor(coefficient);
    int64_t origin[kIn], origin_out[kOut];
    for (int k = 0; k < kIn; ++k) origin[k] = in_[k].origin(row);
    for (int k = 0; kSlopes && k < kOut; ++k) origin_out[k] = shared_[k] ? 0 : out_[k].origin(row);
    WideSum<T> wide;
    for (int64_t c = begin; c < end; c += kStretch) {
      const int n = int(smaller(kStretch, end - c));
      const T* source[kIn];
      T* target[kOut] = {};
      for (int k = 0; k < kIn; ++k) source[k] = in_[k].read(origin[k], c, n, room[k]);
      for (int k = 0; kSlopes && k < kOut; ++k) {
        if (wanted_[k]) target[k] = shared_[k] ? totals[k] + c : out_[k].target(origin_out[k], c, n, room[kIn + k]);
      }
      V state[kWays][kStates];
      for (int way = 0; way < kWays; ++way) {
        for (int s = 0; s < kStates; ++s) state[way][s] = V(T(0));
      }
      for (int first = 0; first < n; first += kBlock) {
        for_vectors_in_turn<T, kWays>(int(smaller(kBlock, n - first)), [&](int at, auto l, int way) UNIGEN_FORCED {
          const int i = first + at;
          V x[kIn], next[kStates], slope[kIn];
          for (int k = 0; k < kIn; ++k) {
            x[k] = load(source[k] + i, l);
            if (kValues && k > 0) __builtin_prefetch(source[k] + i + kElementsAhead);
          }
          if constexpr (kValues) {
            for (int s = 0; s < kStates; ++s) next[s] = state[way][s];
            sum.template add<kSlopes>(next, x, slope);
            for (int s = 0; s < kStates; ++s) state[way][s] = keep(l, next[s], state[way][s]);
          } else {
            slopes_of(sum.formula, x, slope);
          }
          for (int k = 0; kSlopes && k < kOut; ++k) {
            if (!target[k]) continue;
            if constexpr (kWritten == Slopes::scaled) {
              const V gradient = factor * slope[k + 1];
              store(target[k] + i, shared_[k] ? load(target[k] + i, l) + gradient : gradient, l);
            } else {
              store(target[k] + i, slope[k + 1], l);
            }
            __builtin_prefetch(target[k] + i + kElementsAhead, 1);
          }
        });
        for (int way = 0; kValues && way < kWays; ++way) {
          wide.add(state[way][0]);
          state[way][0] = V(T(0));
        }
      }
      if constexpr (kValues) sum.close(state, wide);
      for (int k = 0; kSlopes && k < kOut; ++k) {
        if (target[k] && !shared_[k]) out_[k].written(origin_out[k], c, n, target[k]);
      }
    }
    return wide.total();
  }

  DensitySum<F> sum_;
  int64_t cols_;
  bool keeps_ = false, any_ = false, wanted_[kOut] = {}, shared_[kOut] = {};
  int sums_ = 0;
  Stream<T> in_[kIn], out_[kOut];
};

// body(a number of the arithmetic type, the likelihood's formula)
template <class Body>
void with_density(const ObjectiveTensors& a, const Body& body) {
  with_likelihood(a.likelihood, [&](auto formula) {
    with_arithmetic(a.dtype, [&](auto t) { body(t, formula); });
  });
}

// ---- over the rows ---------------------------------------------------------------------------------------------------

// Examples of `samples` rows each, and how threads share them.
template <class T, class F>
class Examples {
 public:
  Examples(const ObjectiveTensors& a, int64_t samples, const F& formula, const Parallel& parallel)
      : parallel_(parallel),
        samples_(samples),
        count_(a.grid.rows / larger(1, samples)),
        cols_(a.grid.cols),
        few_(count_ < kFewExamples && a.grid.rows * cols_ > 2 * kUnit),
        density_(a, samples, formula) {}

 protected:
  // Work(unit, first example, last, sums of shared gradients) for units of whole examples; returns how many they are.
  template <class Work>
  int64_t by_example(bool gradients, const Work& work) const {
    const bool sums = gradients && density_.sums();
    const int64_t elements = samples_ * larger(1, cols_);
    const Partition partition(count_, elements, false, 1, 1,
                              sums ? larger(kUnit, ceil_div(count_ * elements, kSharedUnits)) : kUnit);
    std::vector<std::unique_ptr<T[]>> rooms(sums ? partition.count : 0);
    partition.run(parallel_, [&](int64_t unit) {
      T* totals[kMaxDecoderOutputs];
      std::unique_ptr<T[]> own;
      if (sums) own = density_.sums_room(totals);
      work(unit, partition.row_begin(unit), partition.row_end(unit), totals);
      if (sums) rooms[unit] = std::move(own);
    });
    if (sums) density_.write_sums(rooms);
    return partition.count;
  }

  // work(unit, row, its columns from, to) for the units of all rows, where threads share the columns
  template <class Work>
  void each_piece(const Work& work) const {
    const int64_t pieces = row_pieces();
    Partition::each(parallel_, count_ * samples_ * pieces, [&](int64_t unit) {
      const int64_t begin = unit % pieces * kPieceCols;
      work(unit, unit / pieces, begin, smaller(cols_, begin + kPieceCols));
    });
  }

  // the rows' sums of of_piece(row, columns from, to)
  template <class OfPiece>
  std::vector<double> by_piece(const OfPiece& of_piece) const {
    const int64_t rows = count_ * samples_, pieces = row_pieces();
    std::vector<double> partial(rows * pieces), sums(rows);
    each_piece([&](int64_t unit, int64_t row, int64_t begin, int64_t end) { partial[unit] = of_piece(row, begin, end); });
    for (int64_t unit = 0; unit < rows * pieces; ++unit) sums[unit / pieces] += partial[unit];
    return sums;
  }

  // The event's gradients, given the rows' coefficients: threads share the rows, or where gradients are sums over these, the
  // columns.
  void pull_back(const T* coefficients, bool kept) const {
    const int64_t rows = count_ * samples_;
    if (density_.any() && kept) {
      Partition::each(parallel_, rows, [&](int64_t row) { density_.scale(row, coefficients[row]); });
    } else if (density_.sums()) {
      std::vector<std::unique_ptr<T[]>> room(1);
      T* totals[kMaxDecoderOutputs];
      room[0] = density_.sums_room(totals);
      const int64_t pieces = ceil_div(cols_, kChunk<T>);
      Partition::each(parallel_, pieces, [&](int64_t piece) {
        const int64_t begin = piece * kChunk<T>, end = smaller(cols_, begin + kChunk<T>);
        for (int64_t row = 0; row < rows; ++row) density_.gradients(row, begin, end, coefficients[row], totals);
      });
      density_.write_sums(room);
    } else if (density_.any()) {
      each_piece([&](int64_t, int64_t row, int64_t begin, int64_t end) {
        density_.gradients(row, begin, end, coefficients[row], nullptr);
      });
    }
  }

  int64_t row_pieces() const { return larger(1, ceil_div(cols_, kPieceCols)); }

  const Parallel& parallel_;
  int64_t samples_, count_, cols_;
  bool few_;  // so that threads share the rows of an example
  Density<T, F> density_;
};

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
