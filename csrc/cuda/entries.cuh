// Table entries: of rows just enqueued, of the rows that stay, and of all rows in a rebuild.
//
// - score_entries: rows against whole blocks of the bank, one warp for kTileRows rows and a strip
//   of groups; sums by group for head's block and the next, by strip for the others.
// - EnterRow puts those together, a warp a part, and adds the row's score with its own positive;
//   survive() does for a row that stays what banked_rows() has left to do. See enter.cuh.
#pragma once

#include "online_softmax.cuh"
#include "reduce.cuh"
#include "ring.cuh"
#include "warp_tile.cuh"

namespace contaccum {

// Which rows get entries, and where the ring stands when they are to hold.
enum class Entries {
  batch,   // the batch's rows, after the step
  before,  // all rows, before the step
  after,   // all rows, after the step
};

// kExpect: expected scores are kept. The loss takes none, so a new row is then scored against every
// block.
template <class S, bool kExpect>
struct EntryRows {
  using A = Acc<S>;
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
    return which == Entries::batch ? was.slot_of(batch_row(i)) : first + i;
  }
  __device__ int batch_row(int i) const { return a.n - count + i; }
  // Where a row and a flat column are: in the bank, or with ~ in the batch, which need not have
  // been written yet.
  __device__ int row_place(int i) const {
    return which == Entries::batch ? ~batch_row(i) : first + i;
  }
  __device__ int column_place(int column) const {
    if (which != Entries::batch) return column;
    const int row = was.row_to(column / a.m);
    return row < 0 ? column : ~(row * a.m + column % a.m);
  }
  __device__ const S* query(int place) const {
    return place < 0 ? a.local_queries + int64_t(~place) * a.d : a.queries + int64_t(place) * a.d;
  }
  __device__ const S* passage(int place) const {
    return place < 0 ? a.local_passages + int64_t(~place) * a.d : a.passages + int64_t(place) * a.d;
  }
  __device__ int64_t id(int place) const { return place < 0 ? a.local_ids[~place] : a.ids[place]; }
  // Blocks to score, beside head's and the next.
  __device__ int blocks() const { return scores_some() ? was.touched() : a.blocks; }
  // The i-th block to score: head's, the next, then the others; -1 past the end.
  __device__ int block(int i) const {
    const int current = ring.block(), next = ring.next_block();
    if (i < 2) return i == 0 ? current : next;
    const int first_block = scores_some() ? was.first_slot() / a.block : 0;
    if (i - 2 >= blocks()) return -1;
    const int b = (first_block + i - 2) % a.blocks;
    return b == current || b == next ? -1 : b;
  }
  // The i of block b, for b other than head's and the next; -1 where the loss has scored it.
  __device__ int index(int b) const {
    if (!scores_some()) return b + 2;
    const int i = (b - was.first_slot() / a.block + a.blocks) % a.blocks;
    return i < was.touched() ? i + 2 : -1;
  }
  __device__ int64_t stride() const { return which == Entries::batch ? a.n : a.rebuild_rows; }
  __device__ EntryPointers<A> group_part(int which_block, int k) const {
    const int64_t at = (int64_t(which_block) * (a.groups + 1) + k) * stride();
    return {a.group_part + at, kExpect ? a.group_part_expected + at : nullptr};
  }
  __device__ EntryPointers<A> strip_part(int i, int strip) const {
    const int64_t at = (int64_t(i - 2) * a.strips + strip) * stride();
    return {a.strip_part + at, kExpect ? a.strip_part_expected + at : nullptr};
  }

 private:
  __device__ bool scores_some() const { return !kExpect && which == Entries::batch; }
};

template <class S>
__device__ bool has_entered(const Args<S>& a, Entries which) {
  return which == Entries::before || batch_is_finite(a);
}

// Grid (rows / kTileRows / kRowWarps, strips, blocks). masked: the batch's ids say whether the bank
// has ids.
template <class S, int V, bool kExpect>
__global__ void __launch_bounds__(kThreads)
    score_entries(const Args<S> a, Entries which, int first_row) {
  using A = Acc<S>;
  using RowLse = Lse<A, kExpect>;
  constexpr int T = kTileRows<A>, L = kLocals<A>;
  const EntryRows<S, kExpect> rows(a, which, first_row, has_entered(a, which));
  const int strip = blockIdx.y * kWarps + threadIdx.x / 32, i = blockIdx.z;
  const int row = blockIdx.x * T;
  if (row >= rows.count || strip >= a.strips) return;
  const int b = rows.block(i);
  if (b < 0) return;

  // The rows' slots need not be neighbours where the ring ends: lanes keep their own.
  const int my_row = min(row + lane_row<A>(), rows.count - 1), slot = rows.slot(my_row);
  const bool leader = row + lane_row<A>() < rows.count && lane_local<A>() == 0;
  const int64_t positive_id = a.masked() ? a.ids[int64_t(slot) * a.m] : -1;
  const S* vectors[T];
#pragma unroll
  for (int t = 0; t < T; ++t)
    vectors[t] = a.queries + int64_t(__shfl_sync(0xffffffffu, slot, t * L)) * a.d;

  auto lse_over = [&](int begin, int end) {  // slots of the bank
    RowLse lse;
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
  RowLse whole;
  for (int k = strip * a.strip_groups; k < min((strip + 1) * a.strip_groups, a.groups); ++k) {
    const int begin = min(b * a.block + k * a.group, last), end = min(begin + a.group, last);
    const bool cut = i == 0 && rows.ring.head > begin && rows.ring.head < end;
    const RowLse lse = lse_over(begin, cut ? rows.ring.head : end);
    if (i >= 2) {
      whole.add(lse);
      continue;
    }
    if (leader) store_entry(rows.group_part(i, k), row + lane_row<A>(), lse);
    if (i != 0 || k != rows.ring.passed_groups()) continue;
    const RowLse rest = lse_over(cut ? rows.ring.head : end, end);
    if (leader) store_entry(rows.group_part(0, a.groups), row + lane_row<A>(), rest);
  }
  if (i >= 2 && leader) store_entry(rows.strip_part(i, strip), row + lane_row<A>(), whole);
}

// What row_state, and beside it `expected`, hold of a row.
template <class A, bool kExpect>
struct RowSums {
  A base, old;
  Lse<A, kExpect> fresh;
  A base_expected, old_expected;
};

template <bool kExpect, class S>
__device__ __forceinline__ RowSums<Acc<S>, kExpect> sums_of(const Args<S>& a, int64_t slot) {
  RowSums<Acc<S>, kExpect> sums;
  sums.base = a.row(kBaseLse)[slot];
  sums.old = a.row(kOldLse)[slot];
  sums.fresh.max = a.row(kFreshMax)[slot];
  sums.fresh.sum = a.row(kFreshSum)[slot];
  if constexpr (kExpect) {
    sums.fresh.weighted = a.expected_row(kFreshWeighted)[slot];
    sums.base_expected = a.expected_row(kBaseExpected)[slot];
    sums.old_expected = a.expected_row(kOldExpected)[slot];
  }
  return sums;
}

template <class S, bool kExpect>
__device__ void set_base(const Args<S>& a, int64_t slot, const Lse<Acc<S>, kExpect>& base,
                         RowSums<Acc<S>, kExpect>& sums) {
  sums.base = a.row(kBaseLse)[slot] = base.value();
  if constexpr (kExpect) sums.base_expected = a.expected_row(kBaseExpected)[slot] = base.expected();
}
template <class S, bool kExpect>
__device__ void set_old(const Args<S>& a, int64_t slot, const Lse<Acc<S>, kExpect>& old,
                        RowSums<Acc<S>, kExpect>& sums) {
  sums.old = a.row(kOldLse)[slot] = old.value();
  if constexpr (kExpect) sums.old_expected = a.expected_row(kOldExpected)[slot] = old.expected();
}

// The row's log-sum-exp over the bank.
template <class S, bool kExpect>
__device__ void combine_row(const Args<S>& a, int64_t slot, const RowSums<Acc<S>, kExpect>& sums) {
  Lse<Acc<S>, kExpect> lse = sums.fresh;
  lse.add_entry(sums.base, sums.base_expected);
  if (a.window_blocks < 0) lse.add_entry(sums.old, sums.old_expected);
  a.row(kRowLse)[slot] = lse.value();
  if constexpr (kExpect) a.expected_row(kRowExpected)[slot] = lse.expected();
}

// Sum of count entries that lie `stride` apart, kAtOnce read together: one wait, not one each.
template <bool kExpect, int kAtOnce = 8, class A>
__device__ Lse<A, kExpect> sum_entries(const EntryPointers<A>& entries, int count, int64_t stride) {
  Lse<A, kExpect> lse;
  for (int begin = 0; begin < count; begin += kAtOnce) {
    A entry[kAtOnce], expected[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const bool there = begin + e < count;
      entry[e] = there ? entries.lse[(begin + e) * stride] : minus_infinity<A>();
      if constexpr (kExpect) expected[e] = there ? entries.expected[(begin + e) * stride] : A(0);
    }
    A top = lse.max;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) top = entry[e] > top ? entry[e] : top;
    const A from = top == minus_infinity<A>() ? A(0) : top;
    lse.sum *= exp_(lse.max - from);
    if constexpr (kExpect) lse.weighted *= exp_(lse.max - from);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      lse.sum += exp_(entry[e] - from);
      if constexpr (kExpect) lse.weighted += exp_(entry[e] - from) * expected[e];
    }
    lse.max = top;
  }
  return lse;
}

// Of count entries, those of the calling lane; then of the warp together.
template <bool kExpect, class A>
__device__ Lse<A, kExpect> sum_entries_by_warp(const EntryPointers<A>& entries, int count,
                                               int64_t stride) {
  const int lane = threadIdx.x % 32;
  Lse<A, kExpect> lse =
      sum_entries<kExpect, 4>(entries + lane * stride, (count - lane + 31) / 32, 32 * stride);
  lse.merge_lanes(32);
  return lse;
}

// A row that is entered: a thread block for each, whose warps wait for memory and for their sums
// side by side. Nothing that one writes is read by another.
template <class S, bool kExpect>
class EnterRow {
  using A = Acc<S>;
  using RowLse = Lse<A, kExpect>;

 public:
  __device__ EnterRow(const EntryRows<S, kExpect>& r, int row)
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
  __device__ RowLse scored_blocks() const {
    RowLse base;
    for (int b = lane; b < a.blocks; b += 32) {
      if (b == next && b != current) continue;
      const int at = b == current ? -1 : rows.index(b);
      RowLse lse;
      if (at >= 0 && a.strips > 1) continue;
      if (at >= 0) {
        add_stored(lse, rows.strip_part(at, 0), i);
      } else if constexpr (!kExpect) {
        A* const units = a.unit_lse + int64_t(b) * a.parts * a.n + rows.batch_row(i);
        if (b != current && b * a.block < rows.was.fill)
          lse = sum_entries<false>(EntryPointers<A>{units, nullptr}, a.parts, a.n);
      }
      set_block(base, b, lse);
    }
    base.merge_lanes(32);
    return base;
  }
  // Blocks of many parts: lanes share them. The groups of the next one stay apart as well.
  __device__ RowLse fresh_blocks() const {
    RowLse base;
    if (next != current) {
      const RowLse lse =
          sum_entries_by_warp<kExpect>(rows.group_part(1, 0) + i, a.groups, rows.stride());
      if (lane == 0) set_block(base, next, lse);
    }
    if (a.strips > 1)
      for (int at = 2; at < 2 + rows.blocks(); ++at) {
        const int b = rows.block(at);
        if (b < 0) continue;
        const RowLse lse =
            sum_entries_by_warp<kExpect>(rows.strip_part(at, 0) + i, a.strips, rows.stride());
        if (lane == 0) set_block(base, b, lse);
      }
    for (int k = lane; k < ring.passed_groups(); k += 32) {
      const EntryPointers<A> from = rows.group_part(1, k);
      a.group_lse[int64_t(k) * a.capacity + slot] = from.lse[i];
      if constexpr (kExpect) a.expected_group(k)[slot] = from.expected[i];
    }
    return base;  // of lane 0
  }
  __device__ RowLse fresh_groups() const {
    return sum_entries_by_warp<kExpect>(rows.group_part(0, 0) + i, min(first_old, a.groups),
                                        rows.stride());
  }
  // Suffix sums over the groups that head has yet to overwrite, 32 at a time from the end; then
  // with what is left of the group that it divides.
  __device__ RowLse old_groups() const {
    struct Read {
      A lse, expected;
    };
    auto read = [&](int k) {
      const EntryPointers<A> from = rows.group_part(0, k);
      return Read{from.lse[i], kExpect ? from.expected[i] : A(0)};
    };
    const Read none{minus_infinity<A>(), A(0)};
    auto entry = [&](int k) { return k >= first_old ? read(k) : none; };
    const Read rest = ring.passed_groups() != first_old ? read(a.groups) : none;
    RowLse suffix;
    Read mine = entry(a.groups - 1 - lane);
    for (int top = a.groups - 1; top >= first_old; top -= 32) {
      const int k = top - lane;
      RowLse sum;
      sum.add_entry(mine.lse, mine.expected);
      mine = entry(k - 32);  // on its way during the sums
      for (int distance = 1; distance < 32; distance *= 2) {
        const RowLse part =
            sum.exchange([&](A x) { return __shfl_up_sync(0xffffffffu, x, distance); });
        if (lane >= distance) sum.add(part);
      }
      sum.add(suffix);
      if (k >= first_old) {
        a.group_lse[int64_t(k) * a.capacity + slot] = sum.value();
        if constexpr (kExpect) a.expected_group(k)[slot] = sum.expected();
      }
      suffix = sum.exchange([&](A x) { return __shfl_sync(0xffffffffu, x, 31); });
    }
    suffix.add_entry(rest.lse, rest.expected);
    return suffix;
  }
  // By a warp. The loss has scored the batch's rows with their positives.
  __device__ void score_positive() const {
    const A score =
        rows.which == Entries::batch
            ? a.local_positive[rows.batch_row(i)]
            : a.scale * warp_dot(a.queries + slot * a.d, a.passages + slot * a.m * a.d, a.d);
    if (lane == 0) a.row(kPositive)[slot] = score;
  }
  __device__ void store(RowLse base, const RowLse& fresh_base, const RowLse& fresh,
                        const RowLse& old) const {
    base.add(fresh_base);
    RowSums<A, kExpect> sums;
    sums.fresh = fresh;
    set_base(a, slot, base, sums);
    a.row(kFreshMax)[slot] = fresh.max;
    a.row(kFreshSum)[slot] = fresh.sum;
    if constexpr (kExpect) a.expected_row(kFreshWeighted)[slot] = fresh.weighted;
    set_old(a, slot, old, sums);
    combine_row(a, slot, sums);
  }

 private:
  __device__ void set_block(RowLse& base, int b, const RowLse& lse) const {
    a.block_lse[int64_t(b) * a.capacity + slot] = lse.value();
    if constexpr (kExpect) a.expected_block(b)[slot] = lse.expected();
    if (ring.is_whole(b)) base.add(lse);
  }

  const Args<S>& a;
  const EntryRows<S, kExpect>& rows;
  const Ring<S>& ring;
  const int i, lane, current, next, first_old;
  const int64_t slot;
};

// Over the whole blocks of the window, which lie in at most two runs of the table.
template <bool kExpect, class S>
__device__ Lse<Acc<S>, kExpect> sum_window_blocks(const Args<S>& a, const Ring<S>& ring,
                                                  int64_t slot) {
  const int whole = ring.whole_blocks(), before = min(whole, ring.block());
  const int wrapped = whole - before;
  const auto sum = [&](int first, int count) {
    const int64_t at = int64_t(first) * a.capacity + slot;
    const EntryPointers<Acc<S>> from{a.block_lse + at, kExpect ? a.expected + at : nullptr};
    return sum_entries<kExpect, 16>(from, count, a.capacity);
  };
  Lse<Acc<S>, kExpect> lse = sum(ring.block() - before, before);
  lse.add(sum(a.blocks - wrapped, wrapped));
  return lse;
}

// Turn the groups of the block that head has entered into sums from there to its end.
template <bool kExpect, class S>
__device__ void sum_suffixes(const Args<S>& a, int first_old, int64_t slot) {
  using A = Acc<S>;
  constexpr int kAtOnce = 16;
  Lse<A, kExpect> suffix;
  for (int end = a.groups; end > first_old; end -= kAtOnce) {
    A* const last = a.group_lse + int64_t(end - 1) * a.capacity + slot;
    A* const last_expected = kExpect ? a.expected_group(end - 1) + slot : nullptr;
    A entry[kAtOnce], expected[kAtOnce] = {};
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      const bool there = end - 1 - e >= first_old;
      entry[e] = there ? last[-int64_t(e) * a.capacity] : minus_infinity<A>();
      if constexpr (kExpect) expected[e] = there ? last_expected[-int64_t(e) * a.capacity] : A(0);
    }
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) {
      add_entry(suffix, entry[e], expected[e]);
      if (end - 1 - e < first_old) continue;
      last[-int64_t(e) * a.capacity] = suffix.value();
      if constexpr (kExpect) last_expected[-int64_t(e) * a.capacity] = suffix.expected();
    }
  }
}

// Bring a surviving row's entries from head to the next head; see banked_rows().
template <class S, bool kExpect>
__device__ void survive(const Args<S>& a, const Ring<S>& was, const Ring<S>& ring, int64_t slot,
                        RowSums<Acc<S>, kExpect> sums) {
  const int first_old = ring.first_old();
  if (was.crosses()) {
    sum_suffixes<kExpect>(a, first_old, slot);
    set_base(a, slot, sum_window_blocks<kExpect>(a, ring, slot), sums);
  }
  if (first_old < a.groups) {
    Lse<Acc<S>, kExpect> old;
    old.add_entry(sums.old, sums.old_expected);
    old.add_entry(a.group_lse[int64_t(first_old) * a.capacity + slot],
                  kExpect ? a.expected_group(first_old)[slot] : Acc<S>(0));
    set_old(a, slot, old, sums);
  }
  combine_row(a, slot, sums);
}

// Another window: the same table, other blocks of it summed. Grid (C / kThreads).
template <class S, bool kExpect>
__global__ void __launch_bounds__(kThreads) sum_window(const Args<S> a) {
  const Ring<S> ring(a, a.cursor);
  const int slot = blockIdx.x * kThreads + threadIdx.x;
  if (slot >= ring.fill) return;
  RowSums<Acc<S>, kExpect> sums = sums_of<kExpect>(a, slot);
  set_base(a, slot, sum_window_blocks<kExpect>(a, ring, slot), sums);
  combine_row(a, slot, sums);
}

}  // namespace contaccum
