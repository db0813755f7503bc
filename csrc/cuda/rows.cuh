// Banked rows x local columns: log-sum-exp and loss of each row, and its table entries.
//
// - A warp holds kTileRows neighbouring rows and walks over the columns, one score a lane, each
//   lane with its own online sums: nothing is shared and nothing waits until a range ends.
// - Scores against the local columns are also what enqueueing adds to the table; the groups that
//   upkeep needs come after them.
// - What depends on all groups of a row is left to survivors() in entries.cuh.
#pragma once

#include "online_softmax.cuh"
#include "ring.cuh"
#include "upkeep.cuh"
#include "warp_tile.cuh"

namespace contaccum {

constexpr int kRowWarps = 4;  // fewer than kWarps: a bank of 2,048 slots should reach every SM
constexpr int kRowThreads = 32 * kRowWarps;

template <class S, int V, bool kExpect>
class BankedRows {
  using A = Acc<S>;
  using RowLse = Lse<A, kExpect>;
  static constexpr int L = kLocals<A>, T = kTileRows<A>;

 public:
  __device__ BankedRows(const Args<S>& args, const Ring<S>& r, int first_slot)
      : a(args),
        ring(r),
        first(first_slot),
        slot(first_slot + lane_row<A>()),
        valid(slot < r.fill),
        leader(valid && lane_local<A>() == 0),
        positive_id(a.masked() && valid ? a.ids[int64_t(slot) * a.m] : -1) {
    rows_from(static_cast<const S*>(a.queries), first, ring.fill - 1, a.d, rows);
  }

  // The loss of the lane's row where the lane is its leader, else 0. With kExpect scale_term
  // becomes its expected score less its own one.
  __device__ double run(bool upkeep, double& scale_term) {
    const bool in_loss = a.banked_rows && valid && ring.in_window(slot);
    const bool offsets = a.use_offsets && a.banked_rows;
    RowLse loss, fresh;
    if (upkeep && valid) {
      fresh.max = a.row(kFreshMax)[slot];
      fresh.sum = a.row(kFreshSum)[slot];
      if constexpr (kExpect) fresh.weighted = a.expected_row(kFreshWeighted)[slot];
    }
    for (int row = 0; row < a.n;) {  // the parts of the batch that land in one block
      const int to = upkeep ? ring.slot_of(row) : 0;
      const int end = upkeep ? min(a.n, row + ring.block_end(to / a.block) - to) : a.n;
      RowLse plain;
      for (int c = row * a.m; c < end * a.m; c += L)
        local_columns(c, end * a.m, offsets, plain, loss);
      plain.merge_lanes(L);
      if (!offsets) loss.add(plain);
      fresh.add(plain);
      if (upkeep && to + end - row == ring.block_end(to / a.block)) {
        const int b = to / a.block;
        if (leader) a.block_lse[int64_t(b) * a.capacity + slot] = fresh.value();
        if constexpr (kExpect)
          if (leader) a.expected_block(b)[slot] = fresh.expected();
        fresh = RowLse{};
      }
      row = end;
    }
    if (upkeep) {
      if (leader) {
        a.row(kFreshMax)[slot] = fresh.max;
        a.row(kFreshSum)[slot] = fresh.sum;
        if constexpr (kExpect) a.expected_row(kFreshWeighted)[slot] = fresh.weighted;
      }
      keep_groups();
    }
    if (offsets) loss.merge_lanes(L);
    if (!in_loss || !leader) return 0;
    A* const banked = a.row(a.banked_columns ? kRowLse : kPositive);
    if constexpr (kExpect)  // of one's own positive alone the score is the expected one
      loss.add_entry(banked[slot],
                     (a.banked_columns ? a.expected_row(kRowExpected) : banked)[slot]);
    else
      loss.add_lse(banked[slot]);
    const A lse = loss.value();
    a.row_lse[slot] = lse;
    if constexpr (kExpect) scale_term = double(loss.expected()) - double(a.row(kPositive)[slot]);
    return double(lse) - double(a.row(kPositive)[slot]);
  }

  // What the table's upkeep needs of the rows.
  __device__ void keep_groups() {
    const Upkeep<S> upkeep(ring);
    for (int i = 0; i < upkeep.count(); ++i) {
      const UpkeepItem item = upkeep.item(i);
      const RowLse lse = banked_columns(item.begin, item.end);
      if (!leader) continue;
      if (item.group < 0)
        a.row(kOldLse)[slot] = lse.value();
      else
        a.group_lse[int64_t(item.group) * a.capacity + slot] = lse.value();
      if constexpr (kExpect) {
        A* const to = item.group < 0 ? a.expected_row(kOldExpected) : a.expected_group(item.group);
        to[slot] = lse.expected();
      }
    }
  }

 private:
  __device__ void local_columns(int column, int end, bool offsets, RowLse& plain, RowLse& biased) {
    const int mine = column + lane_local<A>();
    A s = warp_scores<V>(rows, a.local_passages, column, end - 1, a.d) * a.scale;
    if (mine >= end || (positive_id != -1 && a.local_ids[mine] == positive_id))
      s = minus_infinity<A>();
    plain.add_score(s);
    if (!offsets) return;
    A bias = 0;
    int previous = -1;
    A row_bias = 0;
#pragma unroll 1
    for (int t = 0; t < T; ++t) {  // mostly one run of slots, so one round of products
      const int mean = ring.mean_of(min(first + t, ring.fill - 1));
      if (mean != previous)
        row_bias = warp_bias(a.mean(0, 0), a.mean(mean, 0), a.local_passages, column, end - 1, a.d);
      previous = mean;
      if (t == lane_row<A>()) bias = row_bias;
    }
    biased.add_score(s + bias * a.scale);
  }

  // Log-sum-exp of the rows over slots [begin, end) of the bank.
  __device__ RowLse banked_columns(int begin, int end) {
    RowLse lse;
    for (int c = begin * a.m; c < end * a.m; c += L) {
      const int mine = c + lane_local<A>();
      A s = warp_scores<V>(rows, a.passages, c, end * a.m - 1, a.d) * a.scale;
      if (mine >= end * a.m ||
          (positive_id != -1 && a.ids[mine] == positive_id && mine != slot * a.m))
        s = minus_infinity<A>();
      lse.add_score(s);
    }
    lse.merge_lanes(L);
    return lse;
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const int first, slot;  // the warp's first row, the lane's row
  const bool valid, leader;
  const int64_t positive_id;
  const S* rows[T];
};

// Of all warps, by thread 0.
__device__ __forceinline__ void store_sum(double x, double* to) {
  __shared__ double sums[kRowWarps];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kRowWarps; ++w) sums[0] += sums[w];
  *to = sums[0];
}

// Grid (row_blocks). kExpect: expected scores are kept.
template <class S, int V, bool kExpect>
__global__ void __launch_bounds__(kRowThreads) banked_rows(const Args<S> a) {
  const Ring<S> ring(a, a.position);
  const bool upkeep = a.incremental && batch_is_finite(a);
  const int first = (blockIdx.x * kRowWarps + threadIdx.x / 32) * kTileRows<Acc<S>>;
  double loss = 0, scale_term = 0;
  if (first < ring.fill && (upkeep || a.banked_rows))
    loss = BankedRows<S, V, kExpect>(a, ring, first).run(upkeep, scale_term);
  store_sum(loss, a.losses + a.n + blockIdx.x);
  if constexpr (kExpect) {
    if (a.terms == nullptr) return;
    __syncthreads();  // the sums take the place of the losses
    store_sum(scale_term, a.terms + a.n + blockIdx.x);
  }
}

// The groups alone, in a step that needs more of them than `most`: those are products' to keep
// otherwise, see library.h. Grid (C / rows of a thread block).
template <class S, int V>
__global__ void __launch_bounds__(kRowThreads) keep_many_groups(const Args<S> a, int most) {
  const Ring<S> ring(a, a.position);
  if (Upkeep<S>(ring).count() <= most || !batch_is_finite(a)) return;
  const int first = (blockIdx.x * kRowWarps + threadIdx.x / 32) * kTileRows<Acc<S>>;
  if (first < ring.fill) BankedRows<S, V, false>(a, ring, first).keep_groups();
}

}  // namespace contaccum
