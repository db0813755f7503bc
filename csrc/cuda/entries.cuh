// Table entries: of rows just enqueued, of the rows that stay, and of all rows in a rebuild.
//
// - score_entries: rows against whole blocks of the bank, one warp for kTileRows rows and a strip
//   of groups; sums by group for head's block and the next, by strip for the others.
// - enter_rows: a thread block a row puts those together, a warp a part; beside them a thread a row
//   that stays, what banked_rows() has left to do.
#pragma once

#include "online_softmax.cuh"
#include "reduce.cuh"
#include "ring.cuh"
#include "warp_tile.cuh"

namespace contaccum {

// Which rows get entries, and where the ring stands when they are to hold.
enum class Entries {
  batch,   // the rows just written, after the step
  before,  // all rows, before the step
  after,   // all rows, after the step
};

template <class S>
struct EntryRows {
  const Args<S>& a;
  const Entries which;
  const Ring<S> was, ring;  // before the step; where entries are to hold
  const int first, count;   // rows of this launch; count == 0 where there is nothing to do

  __device__ EntryRows(const Args<S>& args, Entries w, int first_row, bool enqueued)
      : a(args),
        which(w),
        was(args, w == Entries::before ? args.cursor : args.position),
        ring(w == Entries::before ? was : was.after()),
        first(first_row),
        count(!enqueued             ? 0
              : w == Entries::batch ? was.count()
                                    : max(0, min(args.rebuild_rows, ring.fill - first_row))) {}

  __device__ int slot(int i) const {
    return which == Entries::batch ? was.slot_of(a.n - count + i) : first + i;
  }
  // Blocks to score, beside head's and the next.
  __device__ int blocks() const { return which == Entries::batch ? was.touched() : a.blocks; }
  // The i-th block to score: head's, the next, then the others; -1 past the end.
  __device__ int block(int i) const {
    const int current = ring.block(), next = ring.next_block();
    if (i < 2) return i == 0 ? current : next;
    const int first_block = which == Entries::batch ? was.first_slot() / a.block : 0;
    if (i - 2 >= blocks()) return -1;
    const int b = (first_block + i - 2) % a.blocks;
    return b == current || b == next ? -1 : b;
  }
  // The i of block b, for b other than head's and the next; -1 where the loss has scored it.
  __device__ int index(int b) const {
    if (which != Entries::batch) return b + 2;
    const int i = (b - was.first_slot() / a.block + a.blocks) % a.blocks;
    return i < was.touched() ? i + 2 : -1;
  }
  __device__ int64_t stride() const { return which == Entries::batch ? a.n : a.rebuild_rows; }
  __device__ Acc<S>* group_part(int which_block, int k) const {
    return a.group_part + (int64_t(which_block) * (a.groups + 1) + k) * stride();
  }
  __device__ Acc<S>* strip_part(int i, int strip) const {
    return a.strip_part + (int64_t(i - 2) * a.strips + strip) * stride();
  }
};

template <class S>
__device__ bool has_entered(const Args<S>& a, Entries which) {
  return which == Entries::before || batch_is_finite(a);
}

// Grid (rows / kTileRows / kRowWarps, strips, blocks). masked: the batch's ids say whether the bank
// has ids.
template <class S, int V>
__global__ void __launch_bounds__(kThreads)
    score_entries(const Args<S> a, Entries which, int first_row) {
  using A = Acc<S>;
  constexpr int T = kTileRows<A>, L = kLocals<A>;
  const EntryRows<S> rows(a, which, first_row, has_entered(a, which));
  const int strip = blockIdx.y * kWarps + threadIdx.x / 32, i = blockIdx.z;
  const int row = blockIdx.x * T;
  if (row >= rows.count || strip >= a.strips) return;
  const int b = rows.block(i);
  if (b < 0) return;

  // The rows' slots need not be neighbours where the ring ends: lanes keep their own.
  const int my_row = min(row + lane_row<A>(), rows.count - 1), slot = rows.slot(my_row);
  const bool leader = row + lane_row<A>() < rows.count && lane_local<A>() == 0;
  const int64_t positive_id = a.masked() ? a.ids[int64_t(slot) * a.m] : -1;
  int slots[T];
  const S* vectors[T];
#pragma unroll
  for (int t = 0; t < T; ++t) {
    slots[t] = __shfl_sync(0xffffffffu, slot, t * L);
    vectors[t] = a.queries + int64_t(slots[t]) * a.d;
  }

  auto lse_over = [&](int begin, int end) {  // slots of the bank
    Lse<A> lse;
    for (int c = begin * a.m; c < end * a.m; c += L) {
      const int mine = c + lane_local<A>();
      A s = warp_scores<V>(vectors, a.passages, c, end * a.m - 1, a.d) * a.scale;
      if (mine >= end * a.m ||
          (positive_id != -1 && a.ids[mine] == positive_id && mine != slot * a.m))
        s = minus_infinity<A>();
      lse.add_score(s);
    }
    lse.merge_lanes(L);
    return lse;
  };

  const int last = min(rows.ring.block_end(b), rows.ring.fill);
  Lse<A> whole;
  for (int k = strip * a.strip_groups; k < min((strip + 1) * a.strip_groups, a.groups); ++k) {
    const int begin = min(b * a.block + k * a.group, last), end = min(begin + a.group, last);
    const bool cut = i == 0 && rows.ring.head > begin && rows.ring.head < end;
    const Lse<A> lse = lse_over(begin, cut ? rows.ring.head : end);
    if (i >= 2) {
      whole.add(lse);
      continue;
    }
    if (leader) rows.group_part(i, k)[row + lane_row<A>()] = lse.value();
    if (i != 0 || k != rows.ring.passed_groups()) continue;
    const Lse<A> rest = lse_over(cut ? rows.ring.head : end, end);
    if (leader) rows.group_part(0, a.groups)[row + lane_row<A>()] = rest.value();
  }
  if (i >= 2) {
    if (leader) rows.strip_part(i, strip)[row + lane_row<A>()] = whole.value();
    return;
  }
  if (i != 0 || strip != 0) return;
  for (int t = 0; t < T; ++t) {
    const int64_t at = slots[t];
    const A dot = warp_dot(a.queries + at * a.d, a.passages + at * a.m * a.d, a.d);
    if (leader && lane_row<A>() == t) a.row(kPositive)[at] = dot * a.scale;
  }
}

// What row_state holds of a row.
template <class A>
struct RowSums {
  A base, old;
  Lse<A> fresh;
};

template <class S>
__device__ __forceinline__ RowSums<Acc<S>> sums_of(const Args<S>& a, int64_t slot) {
  return {a.row(kBaseLse)[slot],
          a.row(kOldLse)[slot],
          {a.row(kFreshMax)[slot], a.row(kFreshSum)[slot]}};
}

// The row's log-sum-exp over the bank.
template <class S>
__device__ void combine_row(const Args<S>& a, int64_t slot, const RowSums<Acc<S>>& sums) {
  Lse<Acc<S>> lse = sums.fresh;
  lse.add_lse(sums.base);
  if (a.window_blocks < 0) lse.add_lse(sums.old);
  a.row(kRowLse)[slot] = lse.value();
}

// Sum of count entries that lie `stride` apart, kAtOnce read together: one wait, not one each.
template <int kAtOnce = 8, class A>
__device__ Lse<A> sum_entries(const A* entries, int count, int64_t stride) {
  Lse<A> lse;
  for (int begin = 0; begin < count; begin += kAtOnce) {
    A entry[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e)
      entry[e] = begin + e < count ? entries[(begin + e) * stride] : minus_infinity<A>();
    A top = lse.max;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) top = entry[e] > top ? entry[e] : top;
    const A from = top == minus_infinity<A>() ? A(0) : top;
    lse.sum *= exp_(lse.max - from);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) lse.sum += exp_(entry[e] - from);
    lse.max = top;
  }
  return lse;
}

// Of count entries, those of the calling lane; then of the warp together.
template <class A>
__device__ Lse<A> sum_entries_by_warp(const A* entries, int count, int64_t stride) {
  const int lane = threadIdx.x % 32;
  Lse<A> lse = sum_entries<4>(entries + lane * stride, (count - lane + 31) / 32, 32 * stride);
  lse.merge_lanes(32);
  return lse;
}

// A row that is entered: a thread block for each, whose warps wait for memory and for their sums
// side by side. Nothing that one writes is read by another.
template <class S>
class EnterRow {
  using A = Acc<S>;

 public:
  __device__ EnterRow(const EntryRows<S>& r, int row)
      : a(r.a),
        rows(r),
        ring(r.ring),
        i(row),
        lane(threadIdx.x % 32),
        current(ring.block()),
        next(ring.next_block()),
        first_old(ring.first_old()),
        slot(r.slot(row)) {}

  // base: whole blocks of the window, what the loss has scored and what has been scored afresh.
  __device__ Lse<A> scored_blocks() const {
    Lse<A> base;
    for (int b = lane; b < a.blocks; b += 32) {
      if (b == next && b != current) continue;
      const int at = b == current ? -1 : rows.index(b);
      Lse<A> lse;
      if (at >= 0 && a.strips > 1) continue;
      if (at >= 0)
        lse.add_lse(rows.strip_part(at, 0)[i]);
      else if (b != current && b * a.block < rows.was.fill)
        lse = sum_entries(a.unit_lse + int64_t(b) * a.parts * a.n + a.n - rows.count + i, a.parts,
                          a.n);
      set_block(base, b, lse);
    }
    base.merge_lanes(32);
    return base;
  }
  // Blocks of many parts: lanes share them. The groups of the next one stay apart as well.
  __device__ Lse<A> fresh_blocks() const {
    Lse<A> base;
    if (next != current) {
      const Lse<A> lse = sum_entries_by_warp(rows.group_part(1, 0) + i, a.groups, rows.stride());
      if (lane == 0) set_block(base, next, lse);
    }
    if (a.strips > 1)
      for (int at = 2; at < 2 + rows.blocks(); ++at) {
        const int b = rows.block(at);
        if (b < 0) continue;
        const Lse<A> lse = sum_entries_by_warp(rows.strip_part(at, 0) + i, a.strips, rows.stride());
        if (lane == 0) set_block(base, b, lse);
      }
    for (int k = lane; k < ring.passed_groups(); k += 32)
      a.group_lse[int64_t(k) * a.capacity + slot] = rows.group_part(1, k)[i];
    return base;  // of lane 0
  }
  __device__ Lse<A> fresh_groups() const {
    return sum_entries_by_warp(rows.group_part(0, 0) + i, min(first_old, a.groups), rows.stride());
  }
  // Suffix sums over the groups that head has yet to overwrite, 32 at a time from the end; then
  // with what is left of the group that it divides.
  __device__ Lse<A> old_groups() const {
    auto entry = [&](int k) {
      return k >= first_old ? rows.group_part(0, k)[i] : minus_infinity<A>();
    };
    const A rest =
        ring.passed_groups() != first_old ? rows.group_part(0, a.groups)[i] : minus_infinity<A>();
    Lse<A> suffix;
    A mine = entry(a.groups - 1 - lane);
    for (int top = a.groups - 1; top >= first_old; top -= 32) {
      const int k = top - lane;
      Lse<A> sum;
      sum.add_lse(mine);
      mine = entry(k - 32);  // on its way during the sums
      for (int distance = 1; distance < 32; distance *= 2) {
        const A max = __shfl_up_sync(0xffffffffu, sum.max, distance);
        const A part = __shfl_up_sync(0xffffffffu, sum.sum, distance);
        if (lane >= distance) sum.add(max, part);
      }
      sum.add(suffix);
      if (k >= first_old) a.group_lse[int64_t(k) * a.capacity + slot] = sum.value();
      suffix.max = __shfl_sync(0xffffffffu, sum.max, 31);
      suffix.sum = __shfl_sync(0xffffffffu, sum.sum, 31);
    }
    suffix.add_lse(rest);
    return suffix;
  }
  __device__ void store(Lse<A> base, const Lse<A>& fresh_base, const Lse<A>& fresh,
                        const Lse<A>& old) const {
    base.add(fresh_base);
    const RowSums<A> sums{base.value(), old.value(), fresh};
    a.row(kBaseLse)[slot] = sums.base;
    a.row(kFreshMax)[slot] = fresh.max;
    a.row(kFreshSum)[slot] = fresh.sum;
    a.row(kOldLse)[slot] = sums.old;
    combine_row(a, slot, sums);
  }

 private:
  __device__ void set_block(Lse<A>& base, int b, const Lse<A>& lse) const {
    a.block_lse[int64_t(b) * a.capacity + slot] = lse.value();
    if (ring.is_whole(b)) base.add(lse);
  }

  const Args<S>& a;
  const EntryRows<S>& rows;
  const Ring<S>& ring;
  const int i, lane, current, next, first_old;
  const int64_t slot;
};

// Over the whole blocks of the window, which lie in at most two runs of the table.
template <class S>
__device__ Lse<Acc<S>> sum_window_blocks(const Args<S>& a, const Ring<S>& ring, int64_t slot) {
  const int whole = ring.whole_blocks(), before = min(whole, ring.block());
  const int wrapped = whole - before;
  Lse<Acc<S>> lse = sum_entries<16>(
      a.block_lse + int64_t(ring.block() - before) * a.capacity + slot, before, a.capacity);
  lse.add(sum_entries<16>(a.block_lse + int64_t(a.blocks - wrapped) * a.capacity + slot, wrapped,
                          a.capacity));
  return lse;
}

// Turn the groups of the block that head has entered into sums from there to its end.
template <class S>
__device__ void sum_suffixes(const Args<S>& a, int first_old, int64_t slot) {
  using A = Acc<S>;
  constexpr int kAtOnce = 16;
  Lse<A> suffix;
  for (int end = a.groups; end > first_old; end -= kAtOnce) {
    A* const last = a.group_lse + int64_t(end - 1) * a.capacity + slot;
    A entry[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e)
      entry[e] = end - 1 - e >= first_old ? last[-int64_t(e) * a.capacity] : minus_infinity<A>();
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      add_entry(suffix, entry[e]);
      if (end - 1 - e >= first_old) last[-int64_t(e) * a.capacity] = suffix.value();
    }
  }
}

// Bring a surviving row's entries from head to the next head; see banked_rows().
template <class S>
__device__ void survive(const Args<S>& a, const Ring<S>& was, const Ring<S>& ring, int64_t slot,
                        RowSums<Acc<S>> sums) {
  using A = Acc<S>;
  const int first_old = ring.first_old();
  if (was.crosses()) {
    sum_suffixes(a, first_old, slot);
    sums.base = sum_window_blocks(a, ring, slot).value();
    a.row(kBaseLse)[slot] = sums.base;
  }
  if (first_old < a.groups) {
    Lse<A> old;
    old.add_lse(sums.old);
    old.add_lse(a.group_lse[int64_t(first_old) * a.capacity + slot]);
    sums.old = old.value();
    a.row(kOldLse)[slot] = sums.old;
  }
  combine_row(a, slot, sums);
}

constexpr int kEnterWarps = 4;  // the four parts of EnterRow
constexpr int kEnterThreads = 32 * kEnterWarps;

// Grid (survivor blocks of kEnterThreads rows, then rows). With `batch` the first part brings the
// rows that stay up to date; a rebuild has no such part.
template <class S>
__global__ void __launch_bounds__(kEnterThreads)
    enter_rows(const Args<S> a, Entries which, int first_row, int survivor_blocks) {
  using A = Acc<S>;
  const bool survivors = int(blockIdx.x) < survivor_blocks;
  const int slot = blockIdx.x * kEnterThreads + threadIdx.x;
  // Asked for before the barrier that has_entered() waits at: one wait for all.
  RowSums<A> kept{};
  if (survivors && slot < a.capacity) kept = sums_of(a, slot);
  const EntryRows<S> rows(a, which, first_row, true);
  if (!has_entered(a, which)) return;
  if (survivors) {
    if (slot < rows.was.fill && !rows.was.is_written(slot))
      survive(a, rows.was, rows.ring, slot, kept);
    return;
  }
  const int i = blockIdx.x - survivor_blocks, warp = threadIdx.x / 32;
  if (i >= rows.count) return;
  const EnterRow<S> row(rows, i);
  const Lse<A> mine = warp == 0   ? row.old_groups()
                      : warp == 1 ? row.scored_blocks()
                      : warp == 2 ? row.fresh_blocks()
                                  : row.fresh_groups();
  __shared__ A max[kEnterWarps], sum[kEnterWarps];
  if (threadIdx.x % 32 == 0) {
    max[warp] = mine.max;
    sum[warp] = mine.sum;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    row.store({max[1], sum[1]}, {max[2], sum[2]}, {max[3], sum[3]}, {max[0], sum[0]});
}

// Another window: the same table, other blocks of it summed. Grid (C / kThreads).
template <class S>
__global__ void __launch_bounds__(kThreads) sum_window(const Args<S> a) {
  const Ring<S> ring(a, a.cursor);
  const int slot = blockIdx.x * kThreads + threadIdx.x;
  if (slot >= ring.fill) return;
  RowSums<Acc<S>> sums = sums_of(a, slot);
  sums.base = sum_window_blocks(a, ring, slot).value();
  a.row(kBaseLse)[slot] = sums.base;
  combine_row(a, slot, sums);
}

}  // namespace contaccum
