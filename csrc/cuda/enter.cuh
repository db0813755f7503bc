// The end of a step: entries of new rows are put together, rows that stay are brought up to date.
// Beside the last sums of finish_passages(), where entries have been scored by then.
#pragma once

#include "entries.cuh"
#include "reduce.cuh"

namespace contaccum {

constexpr int kEnterWarps = 4;  // the four parts of EnterRow
constexpr int kEnterThreads = 32 * kEnterWarps;

// Thread block `block` of kBlock threads. The first survivor_blocks have a thread for each row that
// stays, the others a row that is new; a rebuild has no rows that stay.
template <int kBlock, bool kExpect, class S>
__device__ void enter(const Args<S>& a, Entries which, int first_row, int survivor_blocks,
                      int block) {
  using A = Acc<S>;
  const bool survivors = block < survivor_blocks;
  const int slot = block * kBlock + threadIdx.x;
  // Asked for before the barrier that has_entered() waits at: one wait for all.
  RowSums<A, kExpect> kept{};
  if (survivors && slot < a.capacity) kept = sums_of<kExpect>(a, slot);
  const EntryRows<S, kExpect> rows(a, which, first_row, true);
  if (!has_entered(a, which)) return;
  if (survivors) {
    if (slot < rows.was.fill && !rows.was.is_written(slot))
      survive(a, rows.was, rows.ring, slot, kept);
    return;
  }
  const int i = block - survivor_blocks, warp = threadIdx.x / 32;
  if (i >= rows.count) return;
  using RowLse = Lse<A, kExpect>;
  const EnterRow<S, kExpect> row(rows, i);
  __shared__ A max[kEnterWarps], sum[kEnterWarps], weighted[kEnterWarps];
  if (warp < kEnterWarps) {
    const RowLse mine = warp == 0   ? row.old_groups()
                        : warp == 1 ? row.scored_blocks()
                        : warp == 2 ? row.fresh_blocks()
                                    : row.fresh_groups();
    if (warp == 3) row.score_positive();
    if (threadIdx.x % 32 == 0) {
      max[warp] = mine.max;
      sum[warp] = mine.sum;
      if constexpr (kExpect) weighted[warp] = mine.weighted;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const auto part = [&](int w) {
    RowLse lse;
    lse.max = max[w];
    lse.sum = sum[w];
    if constexpr (kExpect) lse.weighted = weighted[w];
    return lse;
  };
  row.store(part(1), part(2), part(3), part(0));
}

// Grid (survivor blocks of kEnterThreads rows, then rows).
template <class S, bool kExpect>
__global__ void __launch_bounds__(kEnterThreads)
    enter_rows(const Args<S> a, Entries which, int first_row, int survivor_blocks) {
  enter<kEnterThreads, kExpect>(a, which, first_row, survivor_blocks, blockIdx.x);
}

// Grid (thread blocks of finish_passages, survivor blocks of kThreads rows, rows): for the batch,
// which neither part reads where the other writes.
template <class S, int C>
__global__ void __launch_bounds__(kThreads)
    finish_and_enter(const Args<S> a, int finishing, int survivor_blocks) {
  if (int(blockIdx.x) < finishing)
    finish<C>(a, blockIdx.x);
  else
    enter<kThreads, false>(a, Entries::batch, 0, survivor_blocks, blockIdx.x - finishing);
}

}  // namespace contaccum
