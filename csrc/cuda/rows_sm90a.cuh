// Banked rows x local columns on Hopper's tensor cores; what rows.cuh computes, for 16-bit banks of
// d <= 1024.
//
// - A block takes 128 bank rows at a time and walks over all columns they meet: the local ones and
//   the slots that upkeep needs. It goes on to other rows while there are: what it copies runs
//   ahead. Up to four tiles of 64 columns, which may lie anywhere, make one product. Rows and
//   columns stream through shared memory by slices of 64 elements of d.
// - The thread that copies is the one that works out which columns come, and leaves that in shared
//   memory: code that every warp would run once a tile does not stay in the instruction cache.
// - The two blocks of a cluster need the same columns: each fetches every other tile for both.
// - A warpgroup has 64 rows. A thread carries the sums of two rows over its columns in registers,
//   from tile to tile; the four lanes of a row meet only where a range of columns ends.
#pragma once

#include "groups_sm90a.cuh"
#include "rows_sm90a_shared.cuh"

namespace contaccum {

template <class S, class T>
class BankedRowsHopper {
  using Shared = RowsShared<T>;

 public:
  __device__ BankedRowsHopper(const Args<S>& args, const Ring<S>& r, const RowsMaps& maps_,
                              char* raw, bool upkeep_)
      : a(args),
        ring(r),
        maps(maps_),
        sh(*reinterpret_cast<Shared*>(raw)),
        upkeep(upkeep_),
        rank(int(cluster_rank())),
        slices((args.d + kBoxColumns - 1) / kBoxColumns),
        lane(threadIdx.x % 32),
        group(threadIdx.x / T::kGroup) {}

  __device__ double run() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < T::kStages; ++s) {
        barrier_init(at(sh.full[s]), 1);
        barrier_init(at(sh.empty[s]), 2 * T::kWarpsScoring);  // of both blocks
      }
      for (int b = 0; b < 2; ++b) barrier_init(at(sh.round_over[b]), 2 * T::kGroup);
      barrier_init_fence();
    }
    cluster_sync();
    double loss = 0;
    if (uniform(group < 2)) {
      registers_up_to<T::kScoreRegisters>();
      loss = score();
    } else {
      registers_down_to<T::kCopyRegisters>();
      if (threadIdx.x == 2 * T::kGroup) copy();
    }
    __syncwarp();
    cluster_sync();  // neither block leaves while the other may write to it
    return loss;
  }

 private:
  // The two blocks of a cluster take neighbouring rows, and the same number of them.
  __device__ int first_rows() const { return int(blockIdx.x) * 2 * kBoxRows; }
  __device__ int rows_step() const { return int(gridDim.x) * 2 * kBoxRows; }
  __device__ int rows_end() const {
    const int pairs = (ring.fill + 4 * kBoxRows - 1) / (4 * kBoxRows);
    return (pairs * 2 - 1 + rank) * 2 * kBoxRows;
  }

  // --- one thread: rows and columns from global memory ---

  __device__ void copy() {
    int done = 0, round = 0;
    for (int r = first_rows(); r < rows_end(); r += rows_step()) {
      ColumnWalk<S> walk(a, ring, upkeep);
      for (bool more = walk.next(); more; ++round) {
        more = describe_round(walk, round);
        copy_round(r, round % 2, done);
      }
      const int next = r + rows_step();  // while these are scored
      if (next < rows_end()) prefetch_rows(maps, next, slices);
    }
  }
  // The next tiles of columns; false if they are the last.
  __device__ bool describe_round(ColumnWalk<S>& walk, int round) {
    const int b = round % 2;
    if (round >= 2) barrier_wait(at(sh.round_over[b]), (round / 2 - 1) & 1);
    bool more = true;
    int tiles = 0;
#pragma unroll 1
    for (; tiles < T::kTiles && more; ++tiles) {
      sh.tile[b][tiles] = walk.tile;
      more = walk.next();
    }
    sh.tiles[b] = tiles;
    sh.last[b] = !more;
    return more;
  }
  __device__ void copy_round(int first_row, int b, int& done) {
    const int tiles = sh.tiles[b];
#pragma unroll 1
    for (int s = 0; s < slices; ++s, ++done) {
      const int stage = done % T::kStages;
      const uint32_t full = at(sh.full[stage]);
      // Both blocks have used what the stage held: either may now write to both.
      if (done >= T::kStages) barrier_wait(at(sh.empty[stage]), (done / T::kStages - 1) & 1);
      barrier_expect(full, (2 + tiles) * T::kBoxBytes);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        copy_box(shared_address(sh.rows[stage][h]), &maps.rows, s * kBoxColumns, 0,
                 first_row + h * kBoxRows, full);
#pragma unroll 1
      for (int q = rank; q < tiles; q += 2)
        copy_box_to(3, shared_address(sh.columns[stage][q]),
                    sh.tile[b][q].local ? &maps.local_columns : &maps.banked_columns,
                    s * kBoxColumns, 0, sh.tile[b][q].begin, full);
    }
  }

  // --- two warpgroups: scores, log-sum-exps ---

  // What a thread keeps of its two rows.
  struct Rows {
    int slot[2], bias[2] = {};
    int64_t positive_id[2] = {-1, -1};
    bool valid[2];
    Lse<float> fresh[2];
    Lse2 loss[2], piece[2];
    float rest[2] = {minus_infinity<float>(), minus_infinity<float>()};
    int batch_row = 0;  // those before it have been dealt with
  };

  __device__ __forceinline__ double score() {
    int done = 0, round = 0;
    double loss = 0;
#pragma unroll 1
    for (int r = first_rows(); r < rows_end(); r += rows_step()) loss += score_rows(r, done, round);
    return loss;
  }
  __device__ __forceinline__ double score_rows(int first_row, int& done, int& round) {
    Rows r;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int warp = threadIdx.x / 32 % 4;
      r.slot[h] = first_row + group * kBoxRows + warp * 16 + lane / 4 + 8 * h;
      r.valid[h] = r.slot[h] < ring.fill;
      if (!r.valid[h]) continue;
      if (a.masked()) r.positive_id[h] = a.ids[int64_t(r.slot[h]) * a.m];
      if (with_offsets()) {  // biases are needed once there are scores: a line a lane
        r.bias[h] = ring.mean_of(r.slot[h]) - 1;
        const int64_t padded = padded_locals(a.n * a.m);
        for (int c = lane * 32; c < padded; c += 32 * 32)
          prefetch_line(a.passage_bias + r.bias[h] * padded + c);
      }
      // Needed behind the products, and kept in registers only from there on.
      if (upkeep) {
        prefetch_line(&a.row(kFreshMax)[r.slot[h]]);
        prefetch_line(&a.row(kFreshSum)[r.slot[h]]);
      }
      if (a.banked_rows) {
        prefetch_line(&a.row(a.banked_columns ? kRowLse : kPositive)[r.slot[h]]);
        prefetch_line(&a.row(kPositive)[r.slot[h]]);
      }
    }
    bool begun = false;
    float s[T::kTiles][32];
    for (bool last = false; !last; ++round) {
      const int b = round % 2;
      barrier_wait(at(sh.full[done % T::kStages]), done / T::kStages & 1);
      const int tiles = sh.tiles[b];
      last = uniform(sh.last[b]);
      int64_t id[T::kTiles / 2];
      if (a.masked()) ask_for_ids(sh.tile[b], tiles, id);
      multiply(done, s);
      if (a.masked()) share_ids(id);
      if (upkeep && !begun)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (r.valid[h]) {
            r.fresh[h].max = a.row(kFreshMax)[r.slot[h]];
            r.fresh[h].sum = a.row(kFreshSum)[r.slot[h]];
          }
      begun = true;
      // One copy of the code for all tiles, or it would not fit the instruction cache: 32 moves are
      // cheaper.
#pragma unroll 1
      for (int q = 0; uniform(q < tiles); ++q) {
        float tile[32];
#pragma unroll
        for (int p = 0; p < T::kTiles; ++p)
          if (p == q) {
#pragma unroll
            for (int x = 0; x < 32; ++x) tile[x] = s[p][x];
            hold(tile);  // a branch, not a choice of each register
          }
        const ColumnTile t = sh.tile[b][q];
        add_tile(t, q, tile, r);
      }
      if (a.masked()) sync_group();  // before the ids of the next tiles
      barrier_arrive(at(sh.round_over[b]));
    }
    return finish(r);
  }

  // For conditions that are the same in all lanes but not known to be: lanes that might part cannot
  // exchange anything without coming together first.
  __device__ __forceinline__ static bool uniform(bool x) { return __any_sync(0xffffffffu, x); }
  __device__ __forceinline__ bool with_offsets() const { return a.use_offsets && a.banked_rows; }
  __device__ __forceinline__ bool leads() const { return lane % 4 == 0; }
  __device__ __forceinline__ int my_column(int j) const { return 8 * j + lane % 4 * 2; }
  __device__ __forceinline__ void sync_group() const { named_sync<T::kGroup>(1 + group); }

  // Ids of the columns: half of the warpgroup asks for those of every other tile.
  __device__ __forceinline__ void ask_for_ids(const ColumnTile* round, int tiles,
                                              int64_t (&id)[T::kTiles / 2]) const {
    const int half = threadIdx.x / kBoxRows % 2, l = threadIdx.x % kBoxRows;
#pragma unroll
    for (int x = 0; x < T::kTiles / 2; ++x) {
      const ColumnTile& t = round[2 * x + half];
      if (2 * x + half < tiles)
        id[x] = t.begin + l < t.end ? (t.local ? a.local_ids : a.ids)[t.begin + l] : -1;
    }
  }
  __device__ __forceinline__ void share_ids(const int64_t (&id)[T::kTiles / 2]) {
    const int half = threadIdx.x / kBoxRows % 2, l = threadIdx.x % kBoxRows;
#pragma unroll
    for (int q = 0; q < T::kTiles / 2; ++q) sh.column_id[group][2 * q + half][l] = id[q];
    sync_group();
  }

  // The scores of the warpgroup's 64 rows and the columns of the next tiles. `done` counts slices.
  __device__ __forceinline__ void multiply(int& done, float (&s)[T::kTiles][32]) {
#pragma unroll
    for (int q = 0; q < T::kTiles; ++q)
#pragma unroll
      for (int x = 0; x < 32; ++x) s[q][x] = 0;
    hold(s);
    for (int i = 0; i < slices; ++i, ++done) {
      const int stage = done % T::kStages;
      barrier_wait(at(sh.full[stage]), done / T::kStages & 1);
      products_begin();
      const uint32_t rows = matrix_at(shared_address(sh.rows[stage][group]));
      const uint32_t columns = matrix_at(shared_address(sh.columns[stage]));
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k)
        product<S, false>(s, rows + (k * 32 >> 4), columns + (k * 32 >> 4), 1);
      products_commit();
      if (i > 0) {
        products_wait<1>();
        release(done - 1);
      }
    }
    products_wait<0>();
    hold(s);
    release(done - 1);
  }
  __device__ __forceinline__ void release(int used) {
    __syncwarp();
    const uint32_t empty = at(sh.empty[used % T::kStages]);
    if (lane < 2) barrier_arrive_there(shared_of(empty, lane));
  }

  // A tile's scores, to the sums of the thread's two rows.
  __device__ __forceinline__ void add_tile(const ColumnTile& t, int q, float (&s)[32], Rows& r) {
    const float scale = a.scale * kLog2e;
#pragma unroll
    for (int x = 0; x < 32; ++x) s[x] *= scale;
    if (a.masked() || uniform(t.end - t.begin < kBoxRows)) leave_out(t, q, s, r);
    if (uniform(t.kind == ColumnTile::groups))
      return TileGroups<S>{a, r.slot, r.valid, lane}.keep(t, s);
    const bool biased = with_offsets() && uniform(t.local);
    if (!biased || !add_with_bias(t, s, r)) {
      add_columns(s, r.piece);
      if (biased) {
        add_biases(t, s, r);
        add_columns(s, r.loss);
      }
    }
    if (!uniform(t.ends)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Lse2& piece = r.piece[h];
      piece.merge_lanes();
      if (t.local && !with_offsets()) r.loss[h].add(piece.max, piece.sum);
      const Lse<float> sum = piece.natural();
      piece = Lse2{};
      if (!t.local) {
        r.rest[h] = sum.value();
        continue;
      }
      r.fresh[h].add(sum);
      const int to = upkeep ? ring.slot_of(r.batch_row) : 0, rows = t.row_end - r.batch_row;
      if (!upkeep || to + rows != ring.block_end(to / a.block)) continue;
      if (leads() && r.valid[h])
        a.block_lse[int64_t(to / a.block) * a.capacity + r.slot[h]] = r.fresh[h].value();
      r.fresh[h] = Lse<float>{};
    }
    if (t.local) r.batch_row = t.row_end;
  }

  // No score where there is no column or a false negative.
  __device__ __forceinline__ void leave_out(const ColumnTile& t, int q, float (&s)[32],
                                            const Rows& r) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = my_column(j) + e;
        const int64_t id = a.masked() ? sh.column_id[group][q][c] : -1;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool own = !t.local && t.begin + c == r.slot[h] * a.m;
          if (t.begin + c >= t.end || (id != -1 && id == r.positive_id[h] && !own))
            s[4 * j + 2 * h + e] = minus_infinity<float>();
        }
      }
  }

  // The loss of the thread's rows, of one thread of the four.
  __device__ __forceinline__ double finish(Rows& r) {
    double total = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (with_offsets()) r.loss[h].merge_lanes();
      if (!leads() || !r.valid[h]) continue;
      const int slot = r.slot[h];
      if (upkeep) {
        a.row(kFreshMax)[slot] = r.fresh[h].max;
        a.row(kFreshSum)[slot] = r.fresh[h].sum;
        a.row(kOldLse)[slot] = r.rest[h];
      }
      if (!a.banked_rows || !ring.in_window(slot)) continue;
      Lse<float> whole = r.loss[h].natural();
      whole.add_lse(a.row(a.banked_columns ? kRowLse : kPositive)[slot]);
      const float lse = whole.value();
      a.row_lse[slot] = lse;
      total += double(lse) - double(a.row(kPositive)[slot]);
    }
    return total;
  }

  // The largest score of the thread's row h.
  __device__ __forceinline__ static float top_of(const float (&s)[32], int h) {
    float top = s[2 * h];
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    return top;
  }
  __device__ __forceinline__ static void add_columns(const float (&s)[32], Lse2 (&sums)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = top_of(s, h);
      const float from = fmaxf(top, -1e30f);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        sum += exp2_(s[4 * j + 2 * h] - from) + exp2_(s[4 * j + 2 * h + 1] - from);
      sums[h].add(top, sum);
    }
  }
  // Both sums by one exponential a score: with the bias it differs by a factor, the column's, where
  // the rows have the same offset. False where they do not, or it might be too large or small.
  __device__ __forceinline__ bool add_with_bias(const ColumnTile& t, const float (&s)[32],
                                                Rows& r) const {
    constexpr float kSafe = 32;
    const int64_t padded = padded_locals(a.n * a.m);
    if (t.begin % 2 || t.begin + kBoxRows > padded) return false;
    const float* bias = a.passage_bias + r.bias[0] * padded + t.begin;
    float2 factor[8];
    bool unsafe = r.bias[0] != r.bias[1];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      factor[j] = *reinterpret_cast<const float2*>(bias + my_column(j));
      unsafe |= !(fmaxf(fabsf(factor[j].x), fabsf(factor[j].y)) < kSafe);
    }
    if (uniform(unsafe)) return false;
#pragma unroll
    for (int j = 0; j < 8; ++j) factor[j] = {exp2_(factor[j].x), exp2_(factor[j].y)};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = top_of(s, h);
      const float from = fmaxf(top, -1e30f);
      float sum = 0, with_bias = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = exp2_(s[4 * j + 2 * h] - from), y = exp2_(s[4 * j + 2 * h + 1] - from);
        sum += x + y;
        with_bias += x * factor[j].x + y * factor[j].y;
      }
      r.piece[h].add(top, sum);
      r.loss[h].add(top, with_bias);
    }
    return true;
  }
  __device__ __forceinline__ void add_biases(const ColumnTile& t, float (&s)[32],
                                             const Rows& r) const {
    const int64_t padded = padded_locals(a.n * a.m);
    const int last = int(padded) - 1 - t.begin;  // a tile may begin anywhere
    const bool pairs = uniform(t.begin % 2 == 0 && last >= kBoxRows - 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* bias = a.passage_bias + r.bias[h] * padded + t.begin;
      float2 b[8];
#pragma unroll
      for (int j = 0; j < 8; ++j)
        b[j] = pairs ? *reinterpret_cast<const float2*>(bias + my_column(j))
                     : float2{bias[min(my_column(j), last)], bias[min(my_column(j) + 1, last)]};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        s[4 * j + 2 * h] += b[j].x;
        s[4 * j + 2 * h + 1] += b[j].y;
      }
    }
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const RowsMaps& maps;
  Shared& sh;
  const bool upkeep;
  const int rank, slices, lane, group;
};

// Grid (row_blocks), an even number.
template <class S, class T>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(T::kThreads, 1)
    banked_rows_sm90a(const Args<S> a, const __grid_constant__ RowsMaps maps) {
  extern __shared__ __align__(1024) char dynamic[];
  const Ring<S> ring(a, a.position);
  const bool upkeep = a.incremental && batch_is_finite(a);
  double loss = 0;
  // Both blocks of a cluster stay or go.
  if (int(blockIdx.x / 2) * 4 * kBoxRows < ring.fill && (upkeep || a.banked_rows))
    loss = BankedRowsHopper<S, T>(a, ring, maps, dynamic, upkeep).run();
  double* losses = reinterpret_cast<RowsShared<T>*>(dynamic)->losses;
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0 && threadIdx.x < 2 * T::kGroup) losses[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < T::kWarpsScoring; ++w) loss += losses[w];
  a.losses[a.n + blockIdx.x] = loss;
}

}  // namespace contaccum
