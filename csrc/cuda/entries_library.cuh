// Table entries of all rows from scores that torch's library has computed: what score_entries() in
// entries.cuh does for a rebuild before the step.
#pragma once

#include "entries.cuh"

namespace contaccum {

// The scores of `rows` rows of the bank from first_row on with the columns of `blocks` blocks.
template <class S>
struct EntryChunk {
  int launch_row;  // first of the rows that are entered together
  int first_row, rows;
  int first_block, blocks;
  int64_t columns;
  const Acc<S>* scores;  // (rows, columns)
};

// Each row's score with its own positive, to the accumulation type's precision: it is taken away
// from log-sum-exps that it is part of. A warp a row. Grid (rows / kWarps).
template <class S>
__global__ void __launch_bounds__(kThreads) score_own(const Args<S> a, int first_row, int rows) {
  const int64_t row = blockIdx.x * kWarps + threadIdx.x / 32, slot = first_row + row;
  if (row >= rows) return;
  const Acc<S> dot = warp_dot(a.queries + slot * a.d, a.passages + slot * a.m * a.d, a.d);
  if (threadIdx.x % 32 == 0) a.row(kPositive)[slot] = a.scale * dot;
}

// A warp a row and block. Grid (rows / kWarps, blocks).
template <class S, bool kExpect>
__global__ void __launch_bounds__(kThreads) sum_scores(const Args<S> a, const EntryChunk<S> chunk) {
  using A = Acc<S>;
  using RowLse = Lse<A, kExpect>;
  const EntryRows<S, kExpect> rows(a, Entries::before, chunk.launch_row, true);
  const int within = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot = chunk.first_row + within, b = chunk.first_block + blockIdx.y;
  if (within >= chunk.rows || slot >= rows.ring.fill) return;
  const int first_column = chunk.first_block * a.block * a.m, row = slot - chunk.launch_row;
  const A* scores = chunk.scores + within * chunk.columns - first_column;
  const int64_t positive_id = a.masked() ? a.ids[int64_t(slot) * a.m] : -1;

  auto lse_over = [&](int begin, int end) {  // slots of the bank
    RowLse lse;
    for (int column = begin * a.m + lane; column < end * a.m; column += 32) {
      const bool own = column == slot * a.m;
      A s = own ? a.row(kPositive)[slot] : scores[column] * a.scale;
      if (!own && positive_id != -1 && a.ids[column] == positive_id) s = minus_infinity<A>();
      lse.add_score(s);
    }
    lse.merge_lanes(32);
    return lse;
  };

  const int first = b * a.block, last = min(rows.ring.block_end(b), rows.ring.fill);
  const bool current = b == rows.ring.block(), next = b == rows.ring.next_block();
  if (!current && !next) {
    const RowLse whole = lse_over(first, max(first, last));
    if (lane == 0) store_entry(rows.strip_part(b + 2, 0), row, whole);
    return;
  }
  for (int k = 0; k < a.groups; ++k) {
    const int begin = min(first + k * a.group, last), end = min(begin + a.group, last);
    const RowLse group = lse_over(begin, end);
    if (next && lane == 0) store_entry(rows.group_part(1, k), row, group);
    if (!current) continue;
    const int head = max(begin, min(end, rows.ring.head));
    const bool cut = head > begin && head < end;
    const RowLse before = cut ? lse_over(begin, head) : group;
    if (lane == 0) store_entry(rows.group_part(0, k), row, before);
    if (k != rows.ring.passed_groups()) continue;
    const RowLse rest = lse_over(cut ? head : end, end);
    if (lane == 0) store_entry(rows.group_part(0, a.groups), row, rest);
  }
}

}  // namespace contaccum
