// Banked rows x local columns on tensor cores; what rows.cuh computes, for 16-bit banks.
//
// - A thread block owns 128 rows, or 32 of a small bank, and walks over all columns they meet, a
//   tile at a time: the local ones and the slots that upkeep needs. Rows and columns stream through
//   shared memory by slices of d. Neither kind of columns needs to know of the other: where there
//   are processors enough, each has thread blocks of its own.
// - A few threads a row read the tile of scores and carry the row's sums from tile to tile, so
//   pieces and groups may begin and end anywhere.
// - Offsets: the rows of a block lie in a few runs of slots; each run has one bias a column.
#pragma once

#include "entries_mma.cuh"
#include "entries_mma.h"
#include "online_softmax.cuh"
#include "ptx_mma.cuh"
#include "ring.cuh"
#include "tile_config.cuh"

namespace contaccum {

template <class S, class T>
class BankedRowsMma {
 public:
  struct Shared {
    union {
      char stage[T::kStages][(T::kRows + T::kColumns) * T::kRowBytes];
      float scores[T::kWarpsDeep][T::kRows][T::kScoreStride];  // apart by the warps' share of d
    };
    float bias[T::kRuns][T::kColumns];
    Run runs[T::kRuns];
    double losses[kWarps];
  };

  __device__ BankedRowsMma(const Args<S>& args, const Ring<S>& r, Shared& shared, int first_slot)
      : a(args),
        ring(r),
        sh(shared),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        first(first_slot),
        slot(first + threadIdx.x / T::kLanes),
        valid(slot < r.fill),
        leader(valid && threadIdx.x % T::kLanes == 0),
        positive_id(a.masked() && valid ? a.ids[int64_t(slot) * a.m] : -1) {}

  // The loss of the thread's row where the thread is its leader, else 0.
  __device__ double meet_locals(bool upkeep) {
    const bool in_loss = a.banked_rows && valid && ring.in_window(slot);
    offsets = a.use_offsets && a.banked_rows;
    if (offsets) find_runs();
    Lse<float> fresh;
    if (upkeep && valid) {
      fresh.max = a.row(kFreshMax)[slot];
      fresh.sum = a.row(kFreshSum)[slot];
    }
    float banked = 0, positive = 0;  // asked for early: few columns do not hide a way to memory
    if (in_loss) {
      banked = a.row(a.banked_columns ? kRowLse : kPositive)[slot];
      positive = a.row(kPositive)[slot];
    }
    // The parts of the batch that land in one block of slots.
    int row = 0;
    auto piece_end = [&] {
      const int to = ring.slot_of(row);
      return upkeep ? min(a.n, row + ring.block_end(to / a.block) - to) * a.m : a.n * a.m;
    };
    Lse<float> loss;
    columns(a.local_passages, 0, a.n * a.m, true, piece_end(), [&](Lse<float> piece, int end) {
      if (!offsets) loss.add(piece);
      fresh.add(piece);
      const int to = upkeep ? ring.slot_of(row) : 0, rows = end / a.m - row;
      if (upkeep && to + rows == ring.block_end(to / a.block)) {
        if (leader) a.block_lse[int64_t(to / a.block) * a.capacity + slot] = fresh.value();
        fresh = Lse<float>{};
      }
      row += rows;
      return row < a.n ? piece_end() : end;
    });
    if (upkeep && leader) {
      a.row(kFreshMax)[slot] = fresh.max;
      a.row(kFreshSum)[slot] = fresh.sum;
    }
    if (offsets) {
      biased.merge_lanes(T::kLanes);
      loss = biased;
    }
    if (!in_loss || !leader) return 0;
    loss.add_lse(banked);
    const float lse = loss.value();
    a.row_lse[slot] = lse;
    return double(lse) - double(positive);
  }

  // See BankedRows::keep_groups in rows.cuh.
  __device__ void keep_groups() {
    const Ring<S> next = ring.after();
    const int current = next.block(), done = ring.passed_groups();
    const int passed = next.passed_groups(), first_old = next.first_old();
    const bool crosses = ring.crosses();
    if (crosses)
      keep_block(current, max(first_old, ring.next_block() == current ? done : 0), a.groups);
    keep_block(next.next_block(), crosses ? 0 : done, passed);
    float rest = minus_infinity<float>();
    const int limit = min(ring.block_end(current), ring.fill);
    const int end = min(current * a.block + (passed + 1) * a.group, limit);
    if (passed != first_old && next.head < end)
      columns(a.passages, next.head * a.m, end * a.m, false, end * a.m,
              [&](const Lse<float>& group, int at) {
                rest = group.value();
                return at;
              });
    if (leader) a.row(kOldLse)[slot] = rest;
  }

 private:
  __device__ void find_runs() {
    int last = -1;
    for (int s = first, i = 0; s < min(first + T::kRows, ring.fill); ++i) {
      const Run run = ring.run(s, min(first + T::kRows, ring.fill));
      if (threadIdx.x == 0) sh.runs[i] = run;
      if (slot >= run.begin && slot < run.end) my_run = i;
      s = run.end;
      last = i;
    }
    run_count = last + 1;
    __syncthreads();
  }

  // Walk over columns [begin, end) of a flat array; at the end of each range on_range gets its
  // log-sum-exp and gives the end of the next.
  template <class OnRange>
  __device__ void columns(const S* vectors, int begin, int end, bool is_local, int range_end,
                          OnRange on_range) {
    Lse<float> range;
    for (int tile = begin; tile < end; tile += T::kColumns) {
      const int tile_end = min(tile + T::kColumns, end);
      multiply(vectors, tile, tile_end);
      if (is_local && offsets) offset_scores(tile, tile_end);
      __syncthreads();
      for (int c = tile; c < tile_end;) {
        const int stop = min(range_end, tile_end);
        for (int x = c + threadIdx.x % T::kLanes; x < stop; x += T::kLanes)
          add_column(range, x, x - tile, is_local);
        c = stop;
        if (c == range_end) {
          range.merge_lanes(T::kLanes);
          range_end = on_range(range, c);
          range = Lse<float>{};
        }
      }
      __syncthreads();  // the tile of scores lies where the next slices of d will
    }
  }

  __device__ void add_column(Lse<float>& range, int x, int at, bool is_local) {
    float s = 0;
#pragma unroll
    for (int w = 0; w < T::kWarpsDeep; ++w) s += sh.scores[w][threadIdx.x / T::kLanes][at];
    s *= a.scale;
    if (positive_id != -1) {
      const int64_t id = is_local ? a.local_ids[x] : a.ids[x];
      if (id == positive_id && (is_local || x != slot * a.m)) return;
    }
    range.add_score(s);
    if (is_local && offsets) biased.add_score(s + sh.bias[my_run][at]);
  }

  __device__ void load_slice(const S* vectors, int column, int column_end, int k0, int stage) {
    const uint32_t to = shared_address(sh.stage[stage]);
    constexpr int kChunks = T::kSlice / 8, kRowsAtOnce = kThreads / kChunks;
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, k = k0 + chunk * 8;
#pragma unroll
    for (int i = 0; i < T::kRows / kRowsAtOnce; ++i) {
      const int r = row + i * kRowsAtOnce;
      const bool inside = first + r < ring.fill && k < a.d;
      copy_16(to + r * T::kRowBytes + chunk * 16,
              inside ? a.queries + int64_t(first + r) * a.d + k : a.queries, inside);
    }
#pragma unroll
    for (int i = 0; i < T::kColumns / kRowsAtOnce; ++i) {
      const int c = row + i * kRowsAtOnce;
      const bool inside = column + c < column_end && k < a.d;
      copy_16(to + (T::kRows + c) * T::kRowBytes + chunk * 16,
              inside ? vectors + int64_t(column + c) * a.d + k : vectors, inside);
    }
  }

  // Scores of the rows against columns [column, column_end) into shared memory.
  __device__ void multiply(const S* vectors, int column, int column_end) {
    constexpr int MT = T::kWarpRows / 16, NT = T::kWarpColumns / 8;
    float acc[MT][NT][4] = {};
    const int slices = (a.d + T::kSlice - 1) / T::kSlice;
    const int warp_row = warp % T::kWarpsDown * T::kWarpRows;
    const int warp_column = warp / T::kWarpsDown % T::kWarpsAcross * T::kWarpColumns;
    const int deep = warp / (T::kWarpsDown * T::kWarpsAcross);
    for (int s = 0; s < T::kStages - 1; ++s) {
      if (s < slices) load_slice(vectors, column, column_end, s * T::kSlice, s);
      copy_commit();
    }
    int stage = 0;
    for (int s = 0; s < slices; ++s) {
      copy_wait<T::kStages - 2>();
      __syncthreads();  // slice s has landed for all; slice s - 1 has been used by all
      const int ahead = s + T::kStages - 1;
      if (ahead < slices)
        load_slice(vectors, column, column_end, ahead * T::kSlice,
                   stage == 0 ? T::kStages - 1 : stage - 1);
      copy_commit();
      const uint32_t rows =
          shared_address(sh.stage[stage]) + (warp_row + lane % 16) * T::kRowBytes + lane / 16 * 16;
      // Matrices of a load: columns 0 - 7 and 8 - 15 of d of eight columns, then of the next eight.
      const uint32_t cols = shared_address(sh.stage[stage]) +
                            (T::kRows + warp_column + lane / 16 * 8 + lane % 8) * T::kRowBytes +
                            lane / 8 % 2 * 16;
#pragma unroll
      for (int step = 0; step < T::kSlice / 16 / T::kWarpsDeep; ++step) {
        const int offset = (step * T::kWarpsDeep + deep) * 32;
        uint32_t x[MT][4], y[NT / 2][4];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
          load_matrices(x[mt], rows + mt * 16 * T::kRowBytes + offset);
#pragma unroll
        for (int nt = 0; nt < NT / 2; ++nt)
          load_matrices(y[nt], cols + nt * 16 * T::kRowBytes + offset);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt)
#pragma unroll
          for (int nt = 0; nt < NT; ++nt)
            multiply_add<S>(acc[mt][nt], x[mt], y[nt / 2][nt % 2 * 2], y[nt / 2][nt % 2 * 2 + 1]);
      }
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
    }
    copy_wait<0>();
    __syncthreads();  // the scores take the place of the slices
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(&sh.scores[deep][warp_row + mt * 16 + half * 8 + lane / 4]
                                               [warp_column + nt * 8 + lane % 4 * 2]) =
              make_float2(acc[mt][nt][half * 2], acc[mt][nt][half * 2 + 1]);
  }

  // bias[run][column]: scores of the runs' offsets mean_now - mean_of_run; a few columns a warp.
  __device__ void offset_scores(int column, int column_end) {
    if (a.passage_bias != nullptr) {
      for (int i = threadIdx.x; i < run_count * T::kColumns; i += kThreads) {
        const int run = i / T::kColumns, c = i % T::kColumns;
        if (column + c < column_end)
          sh.bias[run][c] =
              a.passage_bias[(sh.runs[run].mean - 1) * padded_locals(a.n * a.m) + column + c] *
              kLn2;
      }
      return;
    }
    constexpr int kEach = T::kColumns / kWarps;
    for (int i = 0; i < run_count; ++i) {
      const float* now = a.mean(0, 0);
      const float* then = a.mean(sh.runs[i].mean, 0);
      float dot[kEach] = {};
#pragma unroll(kEach > 4 ? 1 : 8)  // loads in flight, where registers allow
      for (int k = lane; k < a.d; k += 32) {
        const float offset = now[k] - then[k];
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int c = min(column + warp * kEach + e, column_end - 1);
          dot[e] += offset * to_acc(a.local_passages[int64_t(c) * a.d + k]);
        }
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const float whole = warp_sum(dot[e]) * a.scale;
        if (lane == 0) sh.bias[i][warp * kEach + e] = whole;
      }
    }
  }

  // Groups [k, k_end) of block b: their log-sum-exps into group_lse.
  __device__ void keep_block(int b, int k, int k_end) {
    const int block_begin = b * a.block, limit = min(ring.block_end(b), ring.fill);
    auto group_end = [&] { return min(block_begin + (k + 1) * a.group, limit) * a.m; };
    auto put = [&](float lse) {
      if (leader) a.group_lse[int64_t(k) * a.capacity + slot] = lse;
      ++k;
    };
    const int begin = block_begin + k * a.group, end = min(block_begin + k_end * a.group, limit);
    if (begin < end)
      columns(a.passages, begin * a.m, end * a.m, false, group_end(),
              [&](const Lse<float>& group, int) {
                put(group.value());
                return group_end();
              });
    while (k < k_end) put(minus_infinity<float>());  // slots not filled yet
  }

  const Args<S>& a;
  const Ring<S>& ring;
  Shared& sh;
  const int warp, lane, first, slot;
  const bool valid, leader;
  const int64_t positive_id;
  bool offsets = false;
  int my_run = 0, run_count = 0;
  Lse<float> biased;
};

// The part-th thread block of `parts` for the same rows: of one, all columns; of two, the local
// ones, or what upkeep needs.
template <class S, class T>
__device__ void score_banked_rows(const Args<S>& a, int block, int part, int parts, char* shared) {
  using Rows = BankedRowsMma<S, T>;
  auto& sh = *reinterpret_cast<typename Rows::Shared*>(shared);
  const Ring<S> ring(a, a.position);
  const bool upkeep = a.incremental && batch_is_finite(a);
  const bool locals = part == 0, keeps = upkeep && part + 1 == parts;
  double loss = 0;
  if (block * T::kRows < ring.fill) {
    Rows rows(a, ring, sh, block * T::kRows);
    if (locals && (upkeep || a.banked_rows)) loss = rows.meet_locals(upkeep);
    if (keeps) rows.keep_groups();
  }
  if (!locals) return;
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0) sh.losses[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) loss += sh.losses[w];
  a.losses[a.n + block] = loss;
}

// Grid (row_blocks, parts).
template <class S, class T>
__global__ void __launch_bounds__(kThreads, 2) banked_rows_mma(const Args<S> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // earlier GPUs take rows.cuh
  extern __shared__ __align__(16) char dynamic[];
  score_banked_rows<S, T>(a, blockIdx.x, blockIdx.y, gridDim.y, dynamic);
#endif
}

// In one launch what a small bank and a small batch leave to both, since neither fills a device and
// each is one chain of latencies: banked rows, and the new rows' table entries. Those wait for
// nothing but the position, and write nothing but scratch. Grid: row_blocks for each of the parts,
// then `entries` in a row.
template <class S>
__global__ void __launch_bounds__(kThreads, 2)
    few_rows_mma(const Args<S> a, int parts, dim3 entries) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  extern __shared__ __align__(16) char dynamic[];
  const int block = blockIdx.x, of_rows = a.row_blocks * parts;
  if (block < of_rows)
    return score_banked_rows<S, FewRows>(a, block % a.row_blocks, block / a.row_blocks, parts,
                                         dynamic);
  const uint32_t i = block - of_rows, strip = i / entries.x;
  const dim3 at(i % entries.x, strip % entries.y, strip / entries.y);
  score_strip<S, SmallEntries, false>(a, Entries::batch, 0, at, dynamic);
#endif
}

}  // namespace contaccum
