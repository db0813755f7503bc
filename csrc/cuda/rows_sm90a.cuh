// Banked rows x local columns on Hopper's tensor cores; what rows.cuh computes, for 16-bit banks of
// d <= 768.
//
// - A block holds 128 bank rows in shared memory and walks over all columns they meet, 64 at a time:
//   the local ones, then the slots that upkeep needs. Columns stream by slices of 64 elements.
// - The two blocks of a cluster need the same columns: each fetches every other slice for both.
// - A warpgroup has 64 rows. A thread carries the sums of two rows over its columns from one tile to
//   the next in registers; the four lanes of a row meet only where a range of columns ends.
#pragma once

#include "online_softmax.cuh"
#include "ptx_sm90a.cuh"
#include "ring.cuh"
#include "tensor_map.h"
#include "tile_config.cuh"

namespace contaccum {

// Up to 64 columns that one product covers.
struct ColumnTile {
  enum { piece, groups, rest } kind;
  bool local;      // else of the bank
  int begin, end;  // flat: slot * m + kind of passage
  int row_end;     // piece: the batch rows before row_end are done with this tile, if it `ends`
  bool ends;
  int group, count;  // groups: the first, and how many
};

// The columns that the rows meet, in the order of csrc/cpu/plan.cpp: the parts of the batch that land
// in one block of slots; groups of the block that head enters; groups of the block after it; the rest
// of a group that head divides.
template <class S>
class ColumnWalk {
 public:
  __device__ ColumnWalk(const Args<S>& args, const Ring<S>& r, bool upkeep_)
      : a(args), ring(r), upkeep(upkeep_), per_tile(kBoxRows / (args.group * args.m)) {}

  __device__ bool next() {
    if (phase == 0) {
      if (column >= piece_end * a.m && piece_end < a.n) {
        const int to = ring.slot_of(piece_end);
        const int room = ring.block_end(to / a.block) - to;
        piece_end = upkeep ? min(a.n, piece_end + room) : a.n;
      }
      if (column < piece_end * a.m) {
        const int end = min(column + kBoxRows, piece_end * a.m);
        tile = {ColumnTile::piece, true, column, end, piece_end, end == piece_end * a.m, 0, 0};
        column = end;
        return true;
      }
      if (!upkeep) return false;
      const Ring<S> after = ring.after();
      const bool crosses = ring.crosses();
      phase = 1;
      if (crosses)
        set_groups(after.block(),
                   max(after.first_old(), ring.next_block() == after.block() ? ring.passed_groups() : 0),
                   a.groups);
    }
    while (phase < 3) {
      if (group < group_end) {
        const int count = min(per_tile, group_end - group), from = block * a.block;
        const int begin = from + group * a.group;
        const int end = max(begin, min(from + (group + count) * a.group, limit));
        tile = {ColumnTile::groups, false, begin * a.m, end * a.m, 0, false, group, count};
        group += count;
        return true;
      }
      const Ring<S> after = ring.after();
      if (++phase == 2)
        set_groups(after.next_block(), ring.crosses() ? 0 : ring.passed_groups(),
                   after.passed_groups());
    }
    if (phase++ > 3) return false;
    const Ring<S> after = ring.after();
    const int passed = after.passed_groups(), current = after.block();
    const int end = min(current * a.block + (passed + 1) * a.group,
                        min(ring.block_end(current), ring.fill));
    if (passed == after.first_old() || after.head >= end) return false;
    tile = {ColumnTile::rest, false, after.head * a.m, end * a.m, 0, true, 0, 0};
    return true;
  }

  ColumnTile tile;

 private:
  __device__ void set_groups(int b, int begin, int end) {
    block = b;
    group = begin;
    group_end = end;
    limit = min(ring.block_end(b), ring.fill);
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const bool upkeep;
  const int per_tile;  // groups
  int phase = 0, column = 0, piece_end = 0;
  int block = 0, group = 0, group_end = 0, limit = 0;
};

struct RowsMaps {
  CUtensorMap rows, local_columns, banked_columns;
};

struct RowsShared {
  char rows[kRowsMaxSlices][2][kRowsBoxBytes];  // first: boxes must be aligned to 1024 bytes
  char columns[kRowsStages][kRowsBoxBytes];
  int64_t column_id[2][kBoxRows];  // by warpgroup
  double losses[2 * kRowsGroup / 32];
  uint64_t rows_full[kRowsMaxSlices], full[kRowsStages], empty[kRowsStages];
};

// A log-sum-exp under construction, base 2, of one thread's columns.
struct Lse2 {
  float max = minus_infinity<float>(), sum = 0;
  __device__ __forceinline__ void add(float other_max, float other_sum) {
    const float both = fmaxf(max, other_max);
    const float top = fmaxf(both, -1e30f);  // -inf minus -inf would be NaN
    sum = sum * exp2_(max - top) + other_sum * exp2_(other_max - top);
    max = both;
  }
  // Over the four lanes of a row; all get the result.
  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      const float other_max = __shfl_xor_sync(0xffffffffu, max, bit);
      const float other_sum = __shfl_xor_sync(0xffffffffu, sum, bit);
      add(other_max, other_sum);
    }
  }
  __device__ __forceinline__ Lse<float> natural() const {
    Lse<float> lse;
    lse.max = max * kLn2;
    lse.sum = sum;
    return lse;
  }
};

template <class S>
class BankedRowsHopper {
 public:
  __device__ BankedRowsHopper(const Args<S>& args, const Ring<S>& r, const RowsMaps& maps_, char* raw,
                              bool upkeep_)
      : a(args),
        ring(r),
        maps(maps_),
        sh(*reinterpret_cast<RowsShared*>(raw)),
        upkeep(upkeep_),
        rank(int(cluster_rank())),
        slices((args.d + kBoxColumns - 1) / kBoxColumns),
        lane(threadIdx.x % 32),
        group(threadIdx.x / kRowsGroup) {}

  __device__ double run() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < slices; ++s) barrier_init(at(sh.rows_full[s]), 1);
      for (int s = 0; s < kRowsStages; ++s) {
        barrier_init(at(sh.full[s]), 1);
        barrier_init(at(sh.empty[s]), 2 * 2 * kRowsGroup / 32);  // warps of both blocks
      }
      barrier_init_fence();
    }
    cluster_sync();
    double loss = 0;
    if (__shfl_sync(0xffffffffu, group, 0) < 2)
      loss = score();
    else if (lane == 0)
      copy();
    __syncwarp();
    cluster_sync();  // neither block leaves while the other may write to it
    return loss;
  }

 private:
  template <class V>
  __device__ static uint32_t at(const V& variable) {
    return shared_address(&variable);
  }

  // --- one thread: rows and columns from global memory ----------------------------------------------

  __device__ void copy() {
    int done = 0;
    ColumnWalk<S> walk(a, ring, upkeep);
    for (bool first = true; walk.next(); first = false)
      for (int s = 0; s < slices; ++s, ++done) {
        if (first) {
          barrier_expect(at(sh.rows_full[s]), 2 * kRowsBoxBytes);
          for (int h = 0; h < 2; ++h)
            copy_box(shared_address(sh.rows[s][h]), &maps.rows, s * kBoxColumns, 0,
                     (blockIdx.x * 2 + h) * kBoxRows, at(sh.rows_full[s]));
        }
        const int stage = done % kRowsStages, before = done - kRowsStages;
        const bool fetches = done % 2 == rank;
        if (before >= 0) {
          // The blocks take turns with a stage: each hears of every other slice that leaves it.
          if (fetches)
            barrier_wait(at(sh.empty[stage]), before / (2 * kRowsStages) & 1);
          else
            barrier_wait(at(sh.full[stage]), before / kRowsStages & 1);
        }
        barrier_expect(at(sh.full[stage]), kRowsBoxBytes);
        if (fetches)
          copy_box_to_both(shared_address(sh.columns[stage]),
                           walk.tile.local ? &maps.local_columns : &maps.banked_columns,
                           s * kBoxColumns, 0, walk.tile.begin, at(sh.full[stage]));
      }
  }

  // --- two warpgroups: scores, log-sum-exps -----------------------------------------------------------

  __device__ double score() {
    const int warp = threadIdx.x / 32 % 4;
    int slot[2], bias_row[2] = {};
    int64_t positive_id[2] = {-1, -1};
    bool valid[2];
    Lse<float> fresh[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      slot[h] = (blockIdx.x * 2 + group) * kBoxRows + warp * 16 + lane / 4 + 8 * h;
      valid[h] = slot[h] < ring.fill;
      if (!valid[h]) continue;
      if (a.masked()) positive_id[h] = a.ids[int64_t(slot[h]) * a.m];
      if (a.use_offsets && a.banked_rows) bias_row[h] = ring.mean_of(slot[h]) - 1;
      if (upkeep) {
        fresh[h].max = a.row(kFreshMax)[slot[h]];
        fresh[h].sum = a.row(kFreshSum)[slot[h]];
      }
    }
    const bool leader = lane % 4 == 0;
    const bool offsets = a.use_offsets && a.banked_rows;
    const float scale = a.scale * kLog2e;
    Lse2 loss[2], piece[2];
    float rest[2] = {minus_infinity<float>(), minus_infinity<float>()};
    int row = 0, done = 0;
    const Ring<S> after = ring.after();
    ColumnWalk<S> walk(a, ring, upkeep);
    while (__shfl_sync(0xffffffffu, int(walk.next()), 0)) {
      const ColumnTile& t = walk.tile;
      if (a.masked()) {  // for all threads of the warpgroup, below
        const int l = threadIdx.x % kRowsGroup;
        if (l < kBoxRows && t.begin + l < t.end)
          sh.column_id[group][l] = (t.local ? a.local_ids : a.ids)[t.begin + l];
      }
      float s[32];
      multiply(done, s);
      if (a.masked()) sync_group();
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int h = x / 2, c = my_column(j) + x % 2;
          float& score = s[4 * j + x];
          score *= scale;
          bool out = t.begin + c >= t.end;
          if (a.masked() && !out)
            out = positive_id[h] != -1 && sh.column_id[group][c] == positive_id[h] &&
                  (t.local || t.begin + c != slot[h] * a.m);
          if (out) score = minus_infinity<float>();
        }
      if (a.masked()) sync_group();  // before the ids of the next tile
      if (t.kind == ColumnTile::groups) {
        keep_groups(t, s, slot, valid, leader);
        continue;
      }
      add_tile(s, piece);
      if (offsets && t.local) add_biased_tile(t, s, bias_row, loss);
      if (!t.ends) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        piece[h].merge_lanes();
        if (t.local && !offsets) loss[h].add(piece[h].max, piece[h].sum);
        const Lse<float> sum = piece[h].natural();
        piece[h] = Lse2{};
        if (!t.local) {
          rest[h] = sum.value();
          continue;
        }
        fresh[h].add(sum);
        const int to = upkeep ? ring.slot_of(row) : 0, rows = t.row_end - row;
        if (upkeep && to + rows == ring.block_end(to / a.block)) {
          if (leader && valid[h])
            a.block_lse[int64_t(to / a.block) * a.capacity + slot[h]] = fresh[h].value();
          fresh[h] = Lse<float>{};
        }
      }
      if (t.local) row = t.row_end;
    }
    double total = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (offsets) loss[h].merge_lanes();
      if (!leader || !valid[h]) continue;
      if (upkeep) {
        a.row(kFreshMax)[slot[h]] = fresh[h].max;
        a.row(kFreshSum)[slot[h]] = fresh[h].sum;
        a.row(kOldLse)[slot[h]] = rest[h];
      }
      if (!a.banked_rows || !ring.in_window(slot[h])) continue;
      Lse<float> whole = loss[h].natural();
      whole.add_lse(a.row(a.banked_columns ? kRowLse : kPositive)[slot[h]]);
      const float lse = whole.value();
      a.row_lse[slot[h]] = lse;
      total += double(lse) - double(a.row(kPositive)[slot[h]]);
    }
    return total;
  }

  __device__ int my_column(int j) const { return 8 * j + lane % 4 * 2; }
  __device__ void sync_group() const {
    if (group == 0)
      named_sync<1, kRowsGroup>();
    else
      named_sync<2, kRowsGroup>();
  }

  // The scores of the warpgroup's 64 rows and the 64 columns of a tile. `done` counts slices.
  __device__ __forceinline__ void multiply(int& done, float (&s)[32]) {
#pragma unroll
    for (int x = 0; x < 32; ++x) s[x] = 0;
    const bool first = done == 0;
    for (int i = 0; i < slices; ++i, ++done) {
      const int stage = done % kRowsStages;
      if (first) barrier_wait(at(sh.rows_full[i]), 0);
      barrier_wait(at(sh.full[stage]), done / kRowsStages & 1);
      hold(s);
      products_begin();
      const uint64_t rows = matrix_at(shared_address(sh.rows[i][group]));
      const uint64_t columns = matrix_at(shared_address(sh.columns[stage]));
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k)
        product_64x64<S, false>(s, rows + (k * 32 >> 4), columns + (k * 32 >> 4), 1);
      products_commit();
      hold(s);
      if (i > 0) {  // the slice before has been used
        products_wait<1>();
        release(done - 1);
      }
    }
    products_wait<0>();
    hold(s);
    release(done - 1);
  }
  // To the block that fetches the next slice into the stage.
  __device__ __forceinline__ void release(int used) {
    __syncwarp();
    const int next = used + kRowsStages;
    if (lane == 0)
      barrier_arrive_there(shared_of(at(sh.empty[used % kRowsStages]), uint32_t(next % 2)));
  }

  // The thread's columns of the tile, to the sums of its two rows.
  __device__ __forceinline__ static void add_tile(const float (&s)[32], Lse2 (&sums)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = s[2 * h];
#pragma unroll
      for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      const float from = fmaxf(top, -1e30f);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        sum += exp2_(s[4 * j + 2 * h] - from) + exp2_(s[4 * j + 2 * h + 1] - from);
      sums[h].add(top, sum);
    }
  }
  __device__ __forceinline__ void add_biased_tile(const ColumnTile& t, float (&s)[32],
                                                  const int (&bias_row)[2], Lse2 (&sums)[2]) const {
    const int columns = a.n * a.m;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = min(t.begin + my_column(j) + e, columns - 1);
          s[4 * j + 2 * h + e] += a.passage_bias[int64_t(bias_row[h]) * columns + c];
        }
    add_tile(s, sums);
  }

  // The tile's groups, each a log-sum-exp of its own, into the table.
  __device__ __forceinline__ void keep_groups(const ColumnTile& t, const float (&s)[32],
                                              const int (&slot)[2], const bool (&valid)[2],
                                              bool leader) {
    const int eights = a.group * a.m / 8;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Lse2 sum;
      int left = eights, k = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = s[4 * j + 2 * h], y = s[4 * j + 2 * h + 1];
        const float top = fmaxf(x, y), from = fmaxf(top, -1e30f);
        sum.add(top, exp2_(x - from) + exp2_(y - from));
        if (--left > 0) continue;
        sum.merge_lanes();
        if (leader && valid[h] && k < t.count)
          a.group_lse[int64_t(t.group + k) * a.capacity + slot[h]] = sum.natural().value();
        sum = Lse2{};
        left = eights;
        ++k;
      }
    }
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const RowsMaps& maps;
  RowsShared& sh;
  const bool upkeep;
  const int rank, slices, lane, group;
};

// Grid (row_blocks, rounded up to clusters of two).
template <class S>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kRowsThreads, 1)
    banked_rows_sm90a(const Args<S> a, const __grid_constant__ RowsMaps maps) {
  extern __shared__ __align__(1024) char dynamic[];
  const Ring<S> ring(a, a.position);
  const bool upkeep = a.incremental && batch_is_finite(a);
  double loss = 0;
  // Both blocks of a cluster stay or go.
  if (int(blockIdx.x / 2) * 4 * kBoxRows < ring.fill && (upkeep || a.banked_rows))
    loss = BankedRowsHopper<S>(a, ring, maps, dynamic, upkeep).run();
  double* losses = reinterpret_cast<RowsShared*>(dynamic)->losses;
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0 && threadIdx.x < 2 * kRowsGroup) losses[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x != 0 || int(blockIdx.x) >= a.row_blocks) return;
  for (int w = 1; w < 2 * kRowsGroup / 32; ++w) loss += losses[w];
  a.losses[a.n + blockIdx.x] = loss;
}

}  // namespace contaccum
