// The driver of kernels on sites: elements of a grid each of which holds several numbers along a dimension of its own.
//
// `lanes` threads of a warp share a site, and `abreast` sites of a row are taken at a time. Where rows are few and long,
// several blocks share one: its partial sums go through the workspace and are added up by a second launch. All sums are
// taken in an order that depends on shapes and the number of multiprocessors alone.
//
// An op has T, `grid`, Site, and Site site(SiteAt, SiteGroup): what the lanes of a site find out together;
//   kReduces   double value(Site) of a site, and double finish(Rows, r, double): the row's value, from the sites' sum
//   else       void write(SiteAt, SiteGroup, Site)
#pragma once

#include "rows.cuh"

namespace unigen::cuda {

// One of the threads that share a site.
struct SiteGroup {
  int lane, lanes;

  template <class T, class Combine>
  UNIGEN_DEVICE T reduce(T x, Combine combine) const {
    for (int step = lanes / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }
};

// A site, or, where there is none for these lanes, the first one, of which nothing may be written.
struct SiteAt {
  Rows rows;
  Index col;
  bool live;

  UNIGEN_DEVICE int64_t offset(const Operand& o) const { return dot(rows.index, o.row) + dot(col, o.col); }

  template <class E, class T>
  UNIGEN_DEVICE T number(const Vectors& v, int64_t i) const {
    return static_cast<T>(static_cast<const E*>(v.at.data)[offset(v.at) + i * v.step]);
  }
  template <class E, class T>
  UNIGEN_DEVICE void store(const Vectors& v, int64_t i, T value) const {
    if (live) static_cast<E*>(v.at.data)[offset(v.at) + i * v.step] = static_cast<E>(value);
  }
};

struct SiteTiling {
  int lane_bits = 0;     // threads of a site: 2^lane_bits, of a warp at most
  int row_bits = 0;      // threads of a row: 2^row_bits >= those of a site
  int64_t row_tiles = 0;  // a tile is the rows of a block
  int64_t parts = 1;     // of a row
  int64_t part_cols = 0;
  bool partial = false;  // row sums of parts go to the workspace
};

template <class Op>
__global__ void __launch_bounds__(kThreads, kResidentOf<Op>)
    sites_kernel(const __grid_constant__ Op op, const __grid_constant__ SiteTiling tile,
                 const __grid_constant__ Scratch scratch) {
  Tiling of_row;
  of_row.lane_bits = tile.row_bits;
  const Group group(of_row);
  const SiteGroup site_group{group.thread & ((1 << tile.lane_bits) - 1), 1 << tile.lane_bits};
  const int abreast = group.lanes >> tile.lane_bits, place = group.lane >> tile.lane_bits;
  double total = 0;
  for (int64_t block = blockIdx.x; block < tile.row_tiles * tile.parts; block += gridDim.x) {
    int64_t row_tile, part;
    divide(block, tile.parts, row_tile, part);
    const int64_t row = row_tile * group.tile_rows + group.row;
    const bool live = row < op.grid.rows;
    const Rows rows{row, split(live ? row : 0, op.grid.row_dims, op.grid.row_size)};
    const int64_t begin = part * tile.part_cols;
    const int64_t end = begin + tile.part_cols < op.grid.cols ? begin + tile.part_cols : op.grid.cols;
    double sum = 0;
    // every lane takes part in the shuffles of every step
    for (int64_t first = begin; first < end; first += abreast) {
      const int64_t col = first + place;
      const bool there = live && col < end;
      const SiteAt at{rows, split(there ? col : 0, op.grid.col_dims, op.grid.col_size), there};
      const auto site = op.site(at, site_group);
      if constexpr (Op::kReduces) {
        if (there && site_group.lane == 0) sum += op.value(site);
      } else {
        op.write(at, site_group, site);
      }
    }
    if constexpr (Op::kReduces) {
      sum = group.reduce(sum, Plus());
      if (live && group.lane == 0) {
        if (tile.partial) {
          static_cast<double*>(scratch.states)[row * tile.parts + part] = sum;
        } else {
          total += op.finish(rows, sum);
        }
      }
    }
  }
  if constexpr (Op::kReduces) {
    if (op.reduction.reduce && !tile.partial) {
      total = Group::block().reduce(total, Plus());
      if (threadIdx.x == 0) {
        if (gridDim.x == 1) {
          op.total(total);
        } else {
          scratch.totals[blockIdx.x] = total;
        }
      }
    }
  }
}

// one block: rows from the sums of their parts, or the total from those of the blocks
template <class Op>
__global__ void __launch_bounds__(kThreads, kResident)
    finish_sites_kernel(const __grid_constant__ Op op, const __grid_constant__ Scratch scratch, int64_t parts, int blocks) {
  double total = 0;
  if (blocks > 0) {
    for (int i = int(threadIdx.x); i < blocks; i += kThreads) total += scratch.totals[i];
  } else {
    for (int64_t row = threadIdx.x; row < op.grid.rows; row += kThreads) {
      double sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += static_cast<const double*>(scratch.states)[row * parts + p];
      total += op.finish(Rows{row, split(row, op.grid.row_dims, op.grid.row_size)}, sum);
    }
  }
  if (op.reduction.reduce) {
    total = Group::block().reduce(total, Plus());
    if (threadIdx.x == 0) op.total(total);
  }
}

// `numbers`: how many of a site's its lanes share.
template <class Op>
const char* run_sites(const Op& op, int64_t numbers, const Launch& launch) {
  const Grid& grid = op.grid;
  if (!Op::kReduces && (grid.rows == 0 || grid.cols == 0)) return nullptr;
  const Scratch scratch{static_cast<double*>(launch.workspace), static_cast<double*>(launch.workspace) + kMaxTotals};
  SiteTiling tile;
  while ((1 << tile.lane_bits) < kWarp && numbers > Op::kOfLane << tile.lane_bits) ++tile.lane_bits;
  tile.row_bits = tile.lane_bits;
  const int64_t crowd = int64_t(launch.multiprocessors) * 512;  // threads that keep memory busy
  while ((1 << tile.row_bits) < kThreads && grid.cols > 1 << (tile.row_bits - tile.lane_bits) &&
         (grid.cols > int64_t(4) << (tile.row_bits - tile.lane_bits) || grid.rows << tile.row_bits < crowd)) {
    ++tile.row_bits;
  }
  tile.row_tiles = divide_up(grid.rows, kThreads >> tile.row_bits);
  const int64_t steps = divide_up(grid.cols, 1 << (tile.row_bits - tile.lane_bits));
  if (tile.row_tiles > 0 && tile.row_tiles < 2 * launch.multiprocessors && steps > 4) {
    tile.parts = clamp(divide_up(steps, 2), 1, divide_up(launch.multiprocessors * 4, tile.row_tiles));
    if (Op::kReduces) tile.parts = clamp(tile.parts, 1, kMaxStates / grid.rows);
  }
  const int64_t part_steps = clamp(divide_up(steps, tile.parts), 1, steps);
  tile.parts = steps > 0 ? divide_up(steps, part_steps) : 1;
  tile.part_cols = part_steps << (tile.row_bits - tile.lane_bits);
  int64_t blocks = tile.row_tiles * tile.parts;
  if constexpr (Op::kReduces) {
    tile.partial = tile.parts > 1;
    if (!tile.partial && op.reduction.reduce) blocks = clamp(blocks, 1, kMaxTotals);
    if (blocks == 0) return nullptr;
    blocks = clamp(blocks, 1, kMaxBlocks);
    if (const char* error = start(sites_kernel<Op>, blocks, 1, launch, op, tile, scratch)) return error;
    if (tile.partial) return start(finish_sites_kernel<Op>, 1, 1, launch, op, scratch, tile.parts, 0);
    if (op.reduction.reduce && blocks > 1)
      return start(finish_sites_kernel<Op>, 1, 1, launch, op, scratch, int64_t(0), int(blocks));
    return nullptr;
  } else {
    return start(sites_kernel<Op>, clamp(blocks, 1, kMaxBlocks), 1, launch, op, tile, scratch);
  }
}

}  // namespace unigen::cuda
