// The drivers for sites: elements of a grid each of which holds several numbers, along a dimension of its own. Lanes are
// sites: a tile of as many sites as a vector has lanes is staged with a vector for each number, whatever the layout, so that
// maxima and sums over a site's numbers are vectors' operations.
#pragma once

#include <memory>

#include "rows.h"

namespace unigen::cpu::UNIGEN_ISA_NAMESPACE {

// rows to columns
template <class T>
UNIGEN_INLINE void transpose(Vec<T>* x) {
  typename Vec<T>::Bits index;
  for (int i = 0; i < Vec<T>::size; ++i) index[i] = i;
#pragma GCC unroll 4
  for (int half = Vec<T>::size / 2; half; half /= 2) {
    const auto upper = (index & half) != 0;
#pragma GCC unroll 16
    for (int i = 0; i < Vec<T>::size; ++i) {
      if (i & half) continue;
      const auto a = x[i].v, b = x[i + half].v;
      x[i] = Vec<T>(__builtin_shuffle(a, b, upper ? index - half + Vec<T>::size : index));
      x[i + half] = Vec<T>(__builtin_shuffle(a, b, upper ? index + Vec<T>::size : index + half));
    }
  }
}

// Room for tiles: a vector for each number of a site.
template <class T>
class TileRoom {
 public:
  static constexpr int kInline = 256;  // vectors

  explicit TileRoom(int64_t vectors) {
    if (vectors > kInline) heap_.reset(new Vec<T>[size_t(vectors)]);
  }
  T* data() { return reinterpret_cast<T*>(heap_ ? heap_.get() : room_); }

 private:
  alignas(kVectorBytes) Vec<T> room_[kInline];
  std::unique_ptr<Vec<T>[]> heap_;
};

// An operand with a dimension more than the grid.
template <class T>
class SiteStream {
  using V = Vec<T>;

 public:
  SiteStream() = default;
  UNIGEN_NOINLINE SiteStream(const Problem& problem, const Vectors& vectors, int64_t numbers)
      : data_(static_cast<char*>(vectors.at.data)),
        dtype_(problem.dtype),
        numbers_(numbers),
        step_(vectors.step),
        sites_(strided(problem.grid, vectors.at, Axis::rows_cols)) {
    adjacent_ = sites_.dims == 0 || (sites_.dims == 1 && sites_.stride[0] == 1);
  }

  bool present() const { return data_; }

  // sites [first, first + n) to tile[number · lanes + lane]; further lanes repeat the last site
  UNIGEN_NOINLINE void read(int64_t first, int n, T* tile) const {
    with_storage<T>(dtype_, data_, [&](const auto* data) { read_from(data, first, n, tile); });
  }

  // whether the numbers of a site are adjacent, and many: worth lanes of their own
  bool long_sites() const { return step_ == 1 && numbers_ >= 4 * V::size; }

  // one site's numbers: where they are, or in `room`
  const T* read_site(int64_t site, T* room) const {
    if (in_place()) return reinterpret_cast<const T*>(data_) + sites_.offset(site);
    with_storage<T>(dtype_, data_, [&](const auto* data) { gather(data + sites_.offset(site), step_, numbers_, room); });
    return room;
  }
  // where to put them, and what to call then
  T* target_site(int64_t site, T* room) const {
    return in_place() ? reinterpret_cast<T*>(data_) + sites_.offset(site) : room;
  }
  void written_site(int64_t site, const T* numbers) const {
    if (in_place()) return;
    with_storage<T>(dtype_, data_, [&](auto* data) { scatter(numbers, data + sites_.offset(site), step_, numbers_); });
  }

  UNIGEN_NOINLINE void write(int64_t first, int n, const T* tile) const {
    with_storage<T>(dtype_, data_, [&](auto* data) { write_to(data, first, n, tile); });
  }

 private:
  bool in_place() const { return step_ == 1 && (dtype_ == DType::float32 || dtype_ == DType::float64); }

  template <class S>
  UNIGEN_INLINE void read_from(const S* data, int64_t first, int n, T* tile) const {
    constexpr bool same = sizeof(S) == sizeof(T);
    if (same && adjacent_ && step_ != 1 && n == V::size && sites_.dims) {
      const T* source = reinterpret_cast<const T*>(data) + first;
      for (int64_t c = 0; c < numbers_; ++c) store(tile + c * V::size, load(source + c * step_));
      return;
    }
    const S* source[V::size];
    const int64_t ahead = V::size * numbers_;  // the next tile, where sites are contiguous
    for (int l = 0; l < V::size; ++l) source[l] = data + sites_.offset(first + (l < n ? l : n - 1));
    for (int64_t c = 0; c < numbers_; c += V::size) {
      const int count = int(smaller(V::size, numbers_ - c));
      V x[V::size];
      if (same && step_ == 1 && count == V::size) {  // with constant bounds, all of it is in registers
        for (int l = 0; l < V::size; ++l) {
          x[l] = load(reinterpret_cast<const T*>(source[l] + c));
          __builtin_prefetch(source[l] + c + ahead);
        }
        transpose(x);
        for (int i = 0; i < V::size; ++i) store(tile + (c + i) * V::size, x[i]);
        continue;
      }
      if (same && step_ == 1) {
        for (int l = 0; l < V::size; ++l) x[l] = load(reinterpret_cast<const T*>(source[l] + c), First<T>{count});
      } else {
        for (int l = 0; l < V::size; ++l) {
          alignas(kVectorBytes) T room[V::size] = {};
          gather(source[l] + c * step_, step_, count, room);
          x[l] = load(room);
        }
      }
      transpose(x);
      for (int i = 0; i < count; ++i) store(tile + (c + i) * V::size, x[i]);
    }
  }

  template <class S>
  UNIGEN_INLINE void write_to(S* data, int64_t first, int n, const T* tile) const {
    constexpr bool same = sizeof(S) == sizeof(T);
    if (same && adjacent_ && step_ != 1 && n == V::size && sites_.dims) {
      T* target = reinterpret_cast<T*>(data) + first;
      for (int64_t c = 0; c < numbers_; ++c) store(target + c * step_, load(tile + c * V::size));
      return;
    }
    S* target[V::size];
    const int64_t ahead = V::size * numbers_;
    for (int l = 0; l < n; ++l) target[l] = data + sites_.offset(first + l);
    for (int64_t c = 0; c < numbers_; c += V::size) {
      const int count = int(smaller(V::size, numbers_ - c));
      V x[V::size];
      if (same && step_ == 1 && count == V::size && n == V::size) {
        for (int i = 0; i < V::size; ++i) x[i] = load(tile + (c + i) * V::size);
        transpose(x);
        for (int l = 0; l < V::size; ++l) {
          store(reinterpret_cast<T*>(target[l] + c), x[l]);
          __builtin_prefetch(target[l] + c + ahead, 1);
        }
        continue;
      }
      for (int i = 0; i < V::size; ++i) x[i] = load(tile + (c + (i < count ? i : 0)) * V::size);
      transpose(x);
      for (int l = 0; l < n; ++l) {
        alignas(kVectorBytes) T room[V::size];
        store(room, x[l]);
        scatter(room, target[l] + c * step_, step_, count);
      }
    }
  }

  char* data_ = nullptr;
  DType dtype_ = DType::float32;
  int64_t numbers_ = 0, step_ = 0;
  bool adjacent_ = false;
  Strided sites_;
};

// Units of whole rows, or pieces of a row, that are worth a thread where a site costs as much as `numbers` elements.
template <class T>
UNIGEN_INLINE Partition site_partition(const Grid& grid, int64_t numbers) {
  const int64_t least = larger(Vec<T>::size, kUnit / larger(numbers, 1));
  return Partition(grid.rows, grid.cols, true, grid.cols % Vec<T>::size ? Vec<T>::size : 1, Vec<T>::size, least);
}

// body(first site, sites) for the tiles of a unit
template <class T, class Body>
UNIGEN_INLINE void for_tiles(const Partition& partition, int64_t unit, const Body& body) {
  int64_t first = partition.row_begin(unit) * partition.cols + partition.col_begin(unit);
  const int64_t end = (partition.row_end(unit) - 1) * partition.cols + partition.col_end(unit);
  for (; first < end; first += Vec<T>::size) body(first, int(smaller(Vec<T>::size, end - first)));
}

// Sums of the sites' values over each row, as RowSum: `start()` makes what a unit works with, of which value(first, n) is
// the vector of values of a tile. finish(unit, row, n, totals) gets the sums of rows [row, row + n).
template <class T>
class SiteSum {
  using V = Vec<T>;

 public:
  SiteSum(const Grid& grid, int64_t numbers) : partition_(site_partition<T>(grid, numbers)) {}

  int64_t units() const { return larger(1, partition_.count); }

  template <class Start, class Finish>
  void run(const Parallel& parallel, const Start& start, const Finish& finish) const {
    if (partition_.cols == 0) return finish_empty_rows(partition_, finish);
    const bool split = partition_.pieces > 1;
    double partial[kMaxUnits + kFewRows];
    partition_.run(parallel, [&](int64_t u) {
      auto worker = start();
      alignas(kVectorBytes) double totals[kChunk<T>];
      int64_t row = partition_.row_begin(u), left = partition_.col_end(u) - partition_.col_begin(u);
      int count = 0;
      double total = 0;
      for_tiles<T>(partition_, u, [&](int64_t first, int n) {
        alignas(kVectorBytes) T values[V::size];
        store(values, worker.value(first, n));
        for (int done = 0; done < n;) {  // rows end anywhere in a tile
          const int run = int(smaller(n - done, left));
          total += partition_.cols == 1 ? double(values[done]) : sum_values(values + done, run);
          done += run;
          left -= run;
          if (left) break;
          totals[count++] = total;
          total = 0;
          left = partition_.cols;
          if (split || count < kChunk<T>) continue;
          finish(u, row, count, totals);
          row += count;
          count = 0;
        }
      });
      if (split) {
        partial[u] = totals[0];
      } else if (count) {
        finish(u, row, count, totals);
      }
    });
    if (split) finish_pieces(partition_, partial, finish);
  }

 private:
  Partition partition_;
};

}  // namespace unigen::cpu::UNIGEN_ISA_NAMESPACE
