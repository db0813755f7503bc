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
      for (int64_t v = 0; v * kLanes < count; ++v)
        vector_of_rows(*s, v, in_loss, tile_bias, stride);
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

  Lse<A> columns_lse(const A* scores, int64_t begin, int64_t end, int64_t v) const {
    Lse<A> r;
    for (int64_t c = begin; c < end; ++c)
      r.max = max_(r.max, load(scores + c * kStride + v * kLanes));
    const Vec<A> shift = r.max > -A(INFINITY) ? r.max : Vec<A>{};
    for (int64_t c = begin; c < end; ++c)
      r.sum += exp_<A>(load(scores + c * kStride + v * kLanes) - shift);
    return r;
  }

  void vector_of_rows(const Segment& s, int64_t v, bool in_loss, const A* bias, int64_t stride) {
    const Vec<A> banked = load_rows(c_.row(c_.options.banked_columns ? kRowLse : kPositive), s, v);
    Lse<A> plain;
    const bool have_plain = pass_ != PassagePass::gradients && (!bias || upkeep_);
    if (have_plain) plain = columns_lse(scores_, 0, columns_, v);
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
      plain = columns_lse(scores_, 0, columns_, v);
    }
    plain.add_lse(banked);
    const Vec<A> lse = plain.value();
    const Vec<A> own = lse - load_rows(c_.row(kPositive), s, v);
    const int64_t valid = min_(kLanes, s.end - s.begin - v * kLanes);
    for (int64_t r = 0; r < valid; ++r) loss_ += double(own[r]);
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
  void keep_table(const Segment& s, int64_t v, const Lse<A>& all_columns) {
    const Plan& plan = c_.plan;
    const int64_t m = c_.layout.m, capacity = c_.layout.capacity;
    const bool one_piece = plan.pieces.size() == 1 && plan.count == c_.n;
    Lse<A> fresh;
    fresh.max = load_rows(c_.row(kFreshMax), s, v);
    fresh.sum = load_rows(c_.row(kFreshSum), s, v);
    for (const Piece& piece : plan.pieces) {
      const int64_t end = piece.row + piece.end - piece.begin;
      const Lse<A> added =
          one_piece ? all_columns : columns_lse(scores_, piece.row * m, end * m, v);
      fresh.add(added.max, added.sum);
      if (!piece.completes) continue;
      store_rows(c_.block_lse + piece.block * capacity, s, v, fresh.value());
      fresh = Lse<A>{};
    }
    store_rows(c_.row(kFreshMax), s, v, fresh.max);
    store_rows(c_.row(kFreshSum), s, v, fresh.sum);

    Vec<A> rest = splat<A>(-A(INFINITY));
    int64_t column = 0;
    for (const UpkeepGroup& g : plan.upkeep) {
      const int64_t end = column + (g.end - g.begin) * m;
      const Vec<A> sum = columns_lse(upkeep_scores_, column, end, v).value();
      column = end;
      if (g.kind == UpkeepGroup::rest)
        rest = sum;
      else
        store_rows(c_.group_lse + g.index * capacity, s, v, sum);
    }
    store_rows(c_.row(kOldLse), s, v, rest);  // completed by finish_rows
  }

  const Context<A, S>& c_;
  PassagePass pass_;
  int64_t column0_, columns_;
  A* sum_;
  A* row_lse_;
  const UpkeepColumns<A>* upkeep_;
  Buffer<A> scores_, upkeep_scores_, tile_;
  double loss_ = 0;
};

}  // namespace
}  // namespace contaccum
