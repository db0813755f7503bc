// (Local and banked rows) x local columns, and the upkeep of the table for the rows that stay.
//
// - The lanes of a vector are neighbouring rows of the bank, so all that is known per row (its
//   log-sum-exp over the bank, its positive score) is loaded, combined and stored in whole vectors.
// - A banked row's log-sum-exp over the bank is in the table: with its scores against the local
//   columns the probabilities are final, and one visit of the row suffices.
// - Scores against the local columns are also what enqueueing adds to the table.
#pragma once

#include "context.h"

namespace contaccum {
namespace {

enum class PassagePass {
  whole,      // all local columns at once: log-sum-exp, loss, gradient, upkeep
  scores,     // too many columns to keep sums for: log-sum-exp, loss and upkeep only ...
  gradients,  // ... then the gradient of a few columns at a time, from the stored log-sum-exp
};

// The banked columns that upkeep scores every row against, packed once per step.
template <class A>
struct UpkeepColumns {
  const A* vectors;    // (count, ld)
  const int64_t* ids;  // (count)
  int64_t count;
};

template <class A, class S>
class PassageTask {
 public:
  // Columns [column0, column1) of the local batch; sum: (column1 - column0, ld), or null.
  // row_lse: (F) by slot, written by `scores` and read by `gradients`.
  PassageTask(const Context<A, S>& c, PassagePass pass, int64_t column0, int64_t column1, A* sum,
              A* row_lse, const UpkeepColumns<A>* upkeep)
      : c_(c),
        pass_(pass),
        column0_(column0),
        columns_(column1 - column0),
        sum_(sum),
        row_lse_(row_lse),
        upkeep_(upkeep),
        scores_(columns_ * kStride),
        upkeep_scores_((upkeep ? upkeep->count : 0) * kStride),
        tile_(kRowTile * c.ld) {
    if (sum_) std::memset(sum_, 0, columns_ * c.ld * sizeof(A));
  }

  double loss() const { return loss_; }
  // Sum over the banked rows of the loss of the expected score less the own one: what scale * dL /
  // dscale has of them, before the row weight. With expected scores in the table only.
  double scale_term() const { return scale_term_; }

  // Local rows [begin, end), whose log-sum-exp is known: lse (n).
  void local_rows(int64_t begin, int64_t end, const A* lse) {
    if (!sum_) return;
    const int64_t m = c_.layout.m;
    for (; begin < end; begin += kRowTile) {
      const int64_t count = min_(kRowTile, end - begin);
      const A* x = c_.local_queries + begin * c_.ld;
      score(x, count);
      if (c_.masked())
        for (int64_t r = 0; r < count; ++r)
          mask_column(r, c_.local_ids[(begin + r) * m], (begin + r) * m - column0_);
      Vec<A> row[kStride / kLanes];
      A* flat = reinterpret_cast<A*>(row);
      std::memcpy(flat, lse + begin, count * sizeof(A));
      for (int64_t r = count; r < round_up(count, kLanes); ++r) flat[r] = 0;
      for (int64_t v = 0; v * kLanes < count; ++v) weights_from_lse(v, row[v], nullptr, 0);
      weighted_sum<A>(scores_, kStride, columns_, count, x, c_.ld, sum_);
    }
  }

  void banked_rows(const Segment* begin, const Segment* end) {
    if (begin == end) return;
    const int64_t d = c_.layout.d;
    const bool offsets = c_.options.use_offsets && c_.options.banked_rows;
    Offsets<A, S> epsilon(c_, begin, offsets ? end : begin, 0, 1);
    const int64_t vectors = epsilon.vectors(), stride = round_up(vectors, 4);
    Buffer<A> bias(columns_ * stride), mass(columns_ * stride);
    if (offsets) {
      score_tile<A>(epsilon.data(), vectors, local_columns(), columns_, c_.ld, c_.scale, bias,
                    stride);
      std::memset(mass, 0, columns_ * stride * sizeof(A));
    }
    int64_t offset = -1;
    for (const Segment* s = begin; s < end; ++s) {
      if (s == begin || s->mean != s[-1].mean) ++offset;
      const bool in_loss = s->in_window && c_.options.banked_rows;
      if (!in_loss && !upkeep_) continue;
      const int64_t count = s->end - s->begin;
      const A* x = as_tile<A>(c_.queries + s->begin * d, count, d, c_.ld, tile_);
      score(x, count);
      if (c_.masked())
        for (int64_t r = 0; r < count; ++r)
          mask_column(r, c_.ids[(s->begin + r) * c_.layout.m], -1);
      if (upkeep_) {
        score_tile<A>(x, count, upkeep_->vectors, upkeep_->count, c_.ld, c_.scale, upkeep_scores_,
                      kStride);
        if (c_.masked()) mask_upkeep(*s);
      }
      const A* tile_bias = offsets ? bias + offset : nullptr;
      for (int64_t v = 0; v * kLanes < count; ++v) {
        if (c_.options.keep_expected)
          vector_of_rows<true>(*s, v, in_loss, tile_bias, stride);
        else
          vector_of_rows<false>(*s, v, in_loss, tile_bias, stride);
      }
      if (!in_loss || !sum_) continue;
      if (offsets)
        for (int64_t c = 0; c < columns_; ++c)
          mass[c * stride + offset] += sum_of<A>(scores_ + c * kStride, count);
      weighted_sum<A>(scores_, kStride, columns_, count, x, c_.ld, sum_);
    }
    if (offsets && sum_)
      weighted_sum<A>(mass, stride, columns_, vectors, epsilon.data(), c_.ld, sum_);
  }

 private:
  static constexpr int64_t kLanes = Simd<A>::lanes;
  static constexpr int64_t kStride = kRowTile;
  static_assert(kRowTile % kLanes == 0, "a tile is a whole number of vectors");

  const A* local_columns() const { return c_.local_passages + column0_ * c_.ld; }
  void score(const A* x, int64_t count) {
    score_tile<A>(x, count, local_columns(), columns_, c_.ld, c_.scale, scores_, kStride);
  }
  void mask_column(int64_t r, int64_t positive_id, int64_t target) {
    if (positive_id == -1) return;
    for (int64_t c = 0; c < columns_; ++c)
      if (c_.local_ids[column0_ + c] == positive_id && c != target)
        scores_[c * kStride + r] = -A(INFINITY);
  }
  void mask_upkeep(const Segment& s) {
    for (int64_t r = 0; r < s.end - s.begin; ++r) {
      const int64_t positive_id = c_.ids[(s.begin + r) * c_.layout.m];
      if (positive_id == -1) continue;
      const int64_t own = (s.begin + r) * c_.layout.m;
      for (int64_t c = 0; c < upkeep_->count; ++c)
        if (upkeep_->ids[c] == positive_id && upkeep_slot_column(c) != own)
          upkeep_scores_[c * kStride + r] = -A(INFINITY);
    }
  }
  // Flat index (slot * m + k) in the bank of upkeep column c.
  int64_t upkeep_slot_column(int64_t c) const {
    const int64_t m = c_.layout.m;
    for (const UpkeepGroup& g : c_.plan.upkeep) {
      const int64_t size = (g.end - g.begin) * m;
      if (c < size) return g.begin * m + c;
      c -= size;
    }
    return -1;
  }

  // Rows [v * kLanes, ...) of the tile; the last vector may reach past the segment, so state goes
  // through a copy of the valid lanes.
  Vec<A> load_rows(const A* from, const Segment& s, int64_t v) const {
    const int64_t at = s.begin + v * kLanes;
    return load_some(from + at, s.end - at);
  }
  void store_rows(A* to, const Segment& s, int64_t v, Vec<A> x) const {
    const int64_t at = s.begin + v * kLanes;
    store_some(to + at, x, s.end - at);
  }

  template <bool kExpect>
  Lse<A, kExpect> columns_lse(const A* scores, int64_t begin, int64_t end, int64_t v) const {
    Lse<A, kExpect> r;
    for (int64_t c = begin; c < end; ++c)
      r.max = max_(r.max, load(scores + c * kStride + v * kLanes));
    const Vec<A> shift = r.max > -A(INFINITY) ? r.max : Vec<A>{};
    for (int64_t c = begin; c < end; ++c) {
      const Vec<A> score = load(scores + c * kStride + v * kLanes);
      const Vec<A> weight = exp_<A>(score - shift);
      r.sum += weight;
      if constexpr (kExpect) r.weighted += weighted_<A>(score, weight);
    }
    return r;
  }

  // kExpect: expected scores are kept.
  template <bool kExpect>
  void vector_of_rows(const Segment& s, int64_t v, bool in_loss, const A* bias, int64_t stride) {
    A* const positive = c_.row(kPositive);
    Lse<A, kExpect> plain;
    const bool have_plain = pass_ != PassagePass::gradients && (!bias || upkeep_);
    if (have_plain) plain = columns_lse<kExpect>(scores_, 0, columns_, v);
    if (upkeep_) keep_table(s, v, plain);
    if (!in_loss) return;
    if (pass_ == PassagePass::gradients) {
      weights_from_lse(v, load_rows(row_lse_, s, v), bias, stride);
      return;
    }
    if (bias) {
      for (int64_t c = 0; c < columns_; ++c) {
        A* at = scores_ + c * kStride + v * kLanes;
        store(at, load(at) + bias[c * stride]);
      }
      plain = columns_lse<kExpect>(scores_, 0, columns_, v);
    }
    const Entries<A> only_own{positive, positive};
    const int64_t first = s.begin + v * kLanes, rows = s.end - first;
    add_entries(plain, c_.options.banked_columns ? c_.row_entries() : only_own, first, rows);
    const Vec<A> lse = plain.value(), score = load_rows(positive, s, v);
    const int64_t valid = min_(kLanes, rows);
    for (int64_t r = 0; r < valid; ++r) loss_ += double(lse[r] - score[r]);
    if constexpr (kExpect) {
      const Vec<A> term = plain.expected() - score;
      for (int64_t r = 0; r < valid; ++r) scale_term_ += double(term[r]);
    }
    if (pass_ == PassagePass::scores) store_rows(row_lse_, s, v, lse);
    if (sum_) weights_from_lse(v, lse, nullptr, 0);
  }

  // scores <- exp(score + bias - lse): the rows' probabilities
  void weights_from_lse(int64_t v, Vec<A> lse, const A* bias, int64_t stride) {
    for (int64_t c = 0; c < columns_; ++c) {
      A* at = scores_ + c * kStride + v * kLanes;
      store(at, exp_<A>(load(at) + (bias ? bias[c * stride] : A(0)) - lse));
    }
  }

  // Add the batch to the rows' table entries and lay down the groups that Plan lists. What combines
  // entries of other blocks is left to finish_rows in row_state.h.
  template <bool kExpect>
  void keep_table(const Segment& s, int64_t v, const Lse<A, kExpect>& all_columns) {
    using RowLse = Lse<A, kExpect>;
    const Plan& plan = c_.plan;
    const int64_t m = c_.layout.m, first = s.begin + v * kLanes, valid = s.end - first;
    const bool one_piece = plan.pieces.size() == 1 && plan.count == c_.n;
    RowLse fresh;
    fresh.max = load_rows(c_.row(kFreshMax), s, v);
    fresh.sum = load_rows(c_.row(kFreshSum), s, v);
    if constexpr (kExpect) fresh.weighted = load_rows(c_.expected_row(kFreshWeighted), s, v);
    for (const Piece& piece : plan.pieces) {
      const int64_t end = piece.row + piece.end - piece.begin;
      fresh.add(one_piece ? all_columns : columns_lse<kExpect>(scores_, piece.row * m, end * m, v));
      if (!piece.completes) continue;
      store_entries(fresh, c_.block(piece.block), first, valid);
      fresh = RowLse{};
    }
    store_rows(c_.row(kFreshMax), s, v, fresh.max);
    store_rows(c_.row(kFreshSum), s, v, fresh.sum);
    if constexpr (kExpect) store_rows(c_.expected_row(kFreshWeighted), s, v, fresh.weighted);

    RowLse rest;
    int64_t column = 0;
    for (const UpkeepGroup& g : plan.upkeep) {
      const int64_t end = column + (g.end - g.begin) * m;
      const RowLse sum = columns_lse<kExpect>(upkeep_scores_, column, end, v);
      column = end;
      if (g.kind == UpkeepGroup::rest)
        rest = sum;
      else
        store_entries(sum, c_.group(g.index), first, valid);
    }
    store_entries(rest, c_.old_entries(), first, valid);  // completed by finish_rows
  }

  const Context<A, S>& c_;
  PassagePass pass_;
  int64_t column0_, columns_;
  A* sum_;
  A* row_lse_;
  const UpkeepColumns<A>* upkeep_;
  Buffer<A> scores_, upkeep_scores_, tile_;
  double loss_ = 0, scale_term_ = 0;
};

}  // namespace
}  // namespace contaccum
