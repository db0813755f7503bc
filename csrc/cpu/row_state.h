// A row's table entries from nothing but the bank: for rows just enqueued, and for a rebuild.
#pragma once

#include "context.h"

namespace contaccum {
namespace {

// Where the ring stands when the entries are to hold.
struct RingView {
  int64_t head, fill;
  const std::vector<int64_t>* window_blocks;
};

// Up to kQueryRows rows of the bank: their vectors (rows, ld), slots and, when masking, the ids of
// their positives.
template <class A>
struct RowSet {
  const A* vectors;
  const int64_t* slots;
  const int64_t* positive_ids;  // or null
  int64_t count;
};

template <class A, class S, bool kExpect>
class RowBuilder {
  using RowLse = ScalarLse<A, kExpect>;

 public:
  RowBuilder(const Context<A, S>& c, const RingView& view)
      : c_(c),
        view_(view),
        scores_(kRows * stride()),
        tile_(stride() * c.ld),
        groups_(kRows * c.layout.groups()),
        group_expected_(kExpect ? kRows * c.layout.groups() : 0) {}

  static constexpr int64_t kRows = 64;

  // Score the rows against the given blocks (flags; null: all) and set their entries for those.
  void score_blocks(const RowSet<A>& rows, const char* blocks) {
    for (int64_t b = 0; b < c_.layout.blocks(); ++b)
      if (!blocks || blocks[b]) score_block(rows, b);
  }

  // Combine the rows' entries for all blocks into their log-sum-exp over the window.
  void combine(const RowSet<A>& rows) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t slot = rows.slots[r];
      RowLse lse, fresh;
      for (int64_t b : *view_.window_blocks) add_entry(lse, c_.block(b), slot);
      store_entry(lse, c_.base_entries(), slot);
      fresh.max = c_.row(kFreshMax)[slot];
      fresh.sum = c_.row(kFreshSum)[slot];
      if constexpr (kExpect) fresh.weighted = c_.expected_row(kFreshWeighted)[slot];
      lse.add(fresh);
      if (c_.options.window_blocks < 0) add_entry(lse, c_.old_entries(), slot);
      store_entry(lse, c_.row_entries(), slot);
    }
  }

 private:
  // Slots scored together: a group where sums by group are wanted, else as many as a tile holds.
  int64_t slots_at_once(bool by_group) const {
    const int64_t group = c_.layout.group, tile = kColumnTile / c_.layout.m;
    return by_group || tile < group ? group : tile;
  }
  int64_t stride() const { return round_up(slots_at_once(false) * c_.layout.m, 16); }

  void score_block(const RowSet<A>& rows, int64_t b) {
    const Layout& y = c_.layout;
    const int64_t first = y.block_begin(b), last = min_(y.block_end(b), view_.fill);
    const int64_t current = view_.head / y.block, offset = view_.head % y.block;
    const int64_t next = (current + 1) % y.blocks();
    const int64_t first_old = (offset + y.group - 1) / y.group;
    const bool by_group = b == current || b == next;
    const int64_t slots = slots_at_once(by_group), units = (y.block + slots - 1) / slots;
    RowLse whole[kRows], fresh[kRows], rest[kRows];
    for (int64_t k = 0; k < units; ++k) {
      const int64_t begin = min_(first + k * slots, last), end = min_(begin + slots, last);
      const int64_t cut = b != current ? end : view_.head < begin ? begin : min_(view_.head, end);
      score(rows, begin, end);
      for (int64_t r = 0; r < rows.count; ++r) {
        const A* s = scores_ + r * stride();
        const RowLse before = lse_of<A, kExpect>(s, (cut - begin) * y.m);
        const RowLse after = lse_of<A, kExpect>(s + (cut - begin) * y.m, (end - cut) * y.m);
        if (b == current) {
          fresh[r].add(before);
          if (k < first_old) rest[r].add(after);
        }
        RowLse group = before;
        group.add(after);
        whole[r].add(group);
        if (by_group) store_entry(group, groups(r), k);
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t slot = rows.slots[r];
      store_entry(b == current ? RowLse{} : whole[r], c_.block(b), slot);
      if (b == next)
        for (int64_t k = 0; k < offset / y.group; ++k) {
          c_.group(k).lse[slot] = groups(r).lse[k];
          if constexpr (kExpect) c_.group(k).expected[slot] = groups(r).expected[k];
        }
      if (b != current) continue;
      c_.row(kFreshMax)[slot] = fresh[r].max;
      c_.row(kFreshSum)[slot] = fresh[r].sum;
      if constexpr (kExpect) c_.expected_row(kFreshWeighted)[slot] = fresh[r].weighted;
      RowLse suffix;
      for (int64_t k = y.groups() - 1; k >= first_old; --k) {
        add_entry(suffix, groups(r), k);
        store_entry(suffix, c_.group(k), slot);
      }
      suffix.add(rest[r]);
      store_entry(suffix, c_.old_entries(), slot);
    }
  }

  // Of a row, by group of a block.
  Entries<A> groups(int64_t r) const {
    const int64_t at = r * c_.layout.groups();
    return {groups_ + at, kExpect ? group_expected_ + at : nullptr};
  }

  void score(const RowSet<A>& rows, int64_t begin, int64_t end) {
    const int64_t m = c_.layout.m, d = c_.layout.d, count = (end - begin) * m;
    if (count <= 0) return;
    const A* x = as_tile<A>(c_.passages + begin * m * d, count, d, c_.ld, tile_);
    score_tile<A>(x, count, rows.vectors, rows.count, c_.ld, c_.scale, scores_, stride());
    if (!rows.positive_ids) return;
    for (int64_t r = 0; r < rows.count; ++r)
      mask_row(scores_ + r * stride(), c_.ids + begin * m, count, rows.positive_ids[r],
               (rows.slots[r] - begin) * m);
  }

  const Context<A, S>& c_;
  RingView view_;
  Buffer<A> scores_, tile_, groups_, group_expected_;
};

// Rows whose entries are combined together: long enough runs of memory to be read ahead of use.
constexpr int64_t kStrip = 1024;

// Combine the entries of all filled rows into their log-sum-exp over the window.
//
// entered: the window's whole blocks are others than last time, so they are summed anew.
// rest: the rows come from the passage side. kOldLse holds what is left of head's own group, to be
// completed by the groups after it; if head has entered their block, they are sums of one group
// each and become sums from each group to the block's end.
template <bool kExpect, class A, class S>
void finish_rows(const Context<A, S>& c, const RingView& view, bool entered, bool rest) {
  using RowLse = Lse<A, kExpect>;
  constexpr int64_t lanes = Simd<A>::lanes;
  const Layout& y = c.layout;
  const int64_t offset = view.head % y.block, first_old = (offset + y.group - 1) / y.group;
  for_each_task((view.fill + kStrip - 1) / kStrip, [&](int64_t task) {
    const int64_t begin = task * kStrip, count = min_(kStrip, view.fill - begin);
    RowLse sums[kStrip / lanes];
    auto for_rows = [&](const auto& visit) {
      for (int64_t r = 0; r < count; r += lanes) visit(sums[r / lanes], begin + r, count - r);
    };
    auto clear = [&] { for_rows([](RowLse& sum, int64_t, int64_t) { sum = RowLse{}; }); };
    if (entered && rest) {
      clear();
      for (int64_t k = y.groups() - 1; k >= first_old; --k)
        for_rows([&](RowLse& sum, int64_t row, int64_t valid) {
          add_entries(sum, c.group(k), row, valid);
          store_entries(sum, c.group(k), row, valid);
        });
    }
    if (entered) {
      clear();
      for (int64_t b : *view.window_blocks)
        for_rows([&](RowLse& sum, int64_t row, int64_t valid) {
          add_entries(sum, c.block(b), row, valid);
        });
      for_rows([&](RowLse& sum, int64_t row, int64_t valid) {
        store_entries(sum, c.base_entries(), row, valid);
      });
    }
    clear();
    for_rows([&](RowLse& sum, int64_t row, int64_t valid) {
      add_entries(sum, c.old_entries(), row, valid);
      if (rest) {
        if (first_old < y.groups()) add_entries(sum, c.group(first_old), row, valid);
        store_entries(sum, c.old_entries(), row, valid);
      }
      if (c.options.window_blocks >= 0) sum = RowLse{};
      add_entries(sum, c.base_entries(), row, valid);
      RowLse fresh;
      fresh.max = load_some(c.row(kFreshMax) + row, valid);
      fresh.sum = load_some(c.row(kFreshSum) + row, valid);
      if constexpr (kExpect)
        fresh.weighted = load_some(c.expected_row(kFreshWeighted) + row, valid);
      sum.add(fresh);
      store_entries(sum, c.row_entries(), row, valid);
    });
  });
}

// The whole table from the bank as it stands: after a change of scale, or a batch as large as the
// bank. Time quadratic in the bank, memory of a few tiles.
template <bool kExpect, class A, class S>
void rebuild_table(const Context<A, S>& c, const RingView& view, bool masked) {
  constexpr int64_t rows = RowBuilder<A, S, kExpect>::kRows;
  const int64_t m = c.layout.m, d = c.layout.d;
  for_each_task((view.fill + rows - 1) / rows, [&](int64_t task) {
    RowBuilder<A, S, kExpect> builder(c, view);
    Buffer<A> vectors(rows * c.ld), positive(c.ld), score(4);
    int64_t slots[rows], positive_ids[rows];
    const int64_t begin = task * rows, count = min_(rows, view.fill - begin);
    convert_rows(c.queries + begin * d, count, d, static_cast<A*>(vectors), c.ld);
    for (int64_t r = 0; r < count; ++r) {
      slots[r] = begin + r;
      positive_ids[r] = c.ids[(begin + r) * m];
      convert_rows(c.passages + (begin + r) * m * d, 1, d, static_cast<A*>(positive), c.ld);
      score_tile<A>(positive, 1, vectors + r * c.ld, 1, c.ld, c.scale, score, 4);
      c.row(kPositive)[begin + r] = score[0];
    }
    const RowSet<A> set{vectors, slots, masked ? positive_ids : nullptr, count};
    builder.score_blocks(set, nullptr);
  });
  finish_rows<kExpect>(c, view, true, false);
}

}  // namespace
}  // namespace contaccum
