// Local rows x (local and banked columns): attention with keys = values = passages.
//
// - A task takes a block of local rows and a run of column tiles; the online softmax keeps its
//   maximum, sum and weighted sum of columns. Tasks over the same rows are merged afterwards.
// - Scores of local rows against whole blocks are also the table entries of the rows to be
// enqueued.
// - An offset shared by a block is one more column: its score is the block's bias, its weight the
//   block's probability mass.
#pragma once

#include "context.h"

namespace contaccum {
namespace {

constexpr int64_t kQueryRows = 64;  // local rows of a task

template <class A>
struct QueryPartial {
  A* max;  // (n)
  A* sum;  // (n)
  A* out;  // (n, ld) sum over columns of exp(score - max) * column, or null without gradients
};

template <class A, class S>
class QueryTask {
 public:
  // Local rows [row0, row1). new_rows: (n, blocks) table entries of the rows to be enqueued, or
  // null.
  QueryTask(const Context<A, S>& c, int64_t row0, int64_t row1, const QueryPartial<A>& part,
            A* new_rows)
      : c_(c),
        row0_(row0),
        rows_(row1 - row0),
        // a slot's passages are never split between tiles
        tile_columns_(c.layout.m > kColumnTile ? c.layout.m : kColumnTile),
        stride_(round_up(tile_columns_, 16)),
        part_(part),
        new_rows_(new_rows),
        scores_(rows_ * stride_),
        tile_(tile_columns_ * c.ld),
        block_max_(rows_),
        block_sum_(rows_) {
    for (int64_t r = 0; r < rows_; ++r) {
      part.max[row0 + r] = -A(INFINITY);
      part.sum[row0 + r] = 0;
    }
    if (part.out) std::memset(part.out + row0 * c.ld, 0, rows_ * c.ld * sizeof(A));
  }

  void local_columns() {
    const int64_t m = c_.layout.m, total = c_.n * m;
    for (int64_t begin = 0; begin < total; begin += kColumnTile) {
      const int64_t count = min_(kColumnTile, total - begin);
      const A* x = c_.local_passages + begin * c_.ld;
      score(x, count);
      if (c_.masked())
        for (int64_t r = 0; r < rows_; ++r) {
          const int64_t target = (row0_ + r) * m;
          mask_row(scores_ + r * stride_, c_.local_ids + begin, count, c_.local_ids[target],
                   target - begin);
        }
      absorb(x, count, nullptr, 0);
    }
  }

  void banked_columns(const Segment* begin, const Segment* end) {
    if (begin == end) return;
    const int64_t m = c_.layout.m, d = c_.layout.d;
    const bool offsets = c_.options.use_offsets;
    const Segment* used_end = offsets ? end : begin;
    Offsets<A, S> delta(c_, begin, used_end, 1, m);
    const int64_t vectors = delta.vectors(), stride = round_up(vectors, 4);
    Buffer<A> bias(rows_ * stride), mass(rows_ * stride);
    if (offsets) {
      score_tile<A>(delta.data(), vectors, local_rows(), rows_, c_.ld, c_.scale, bias, stride);
      std::memset(mass, 0, rows_ * stride * sizeof(A));
    }
    int64_t offset = -1;
    clear_block();
    for (const Segment* s = begin; s < end; ++s) {
      if (s == begin || s->mean != s[-1].mean) ++offset;
      const bool in_loss = s->in_window && c_.options.banked_columns;
      const bool for_table = new_rows_ && !c_.plan.direct[s->block];
      if (in_loss || for_table) {
        const int64_t count = (s->end - s->begin) * m;
        const A* x = as_tile<A>(c_.passages + s->begin * m * d, count, d, c_.ld, tile_);
        score(x, count);
        if (c_.masked())
          for (int64_t r = 0; r < rows_; ++r)
            mask_row(scores_ + r * stride_, c_.ids + s->begin * m, count,
                     c_.local_ids[(row0_ + r) * m], -1);
        if (for_table)
          for (int64_t r = 0; r < rows_; ++r) {
            const ScalarLse<A> tile = lse_of<A>(scores_ + r * stride_, count);
            ScalarLse<A> block = block_lse(r);
            block.add(tile);
            block_max_[r] = block.max;
            block_sum_[r] = block.sum;
          }
        if (in_loss)
          absorb(x, count, offsets ? bias + offset * m : nullptr, stride,
                 offsets ? mass + offset * m : nullptr, mass, vectors);
      }
      if (for_table && (s + 1 == end || s[1].block != s->block)) {
        for (int64_t r = 0; r < rows_; ++r)
          new_rows_[(row0_ + r) * c_.layout.blocks() + s->block] = block_lse(r).value();
        clear_block();
      }
    }
    if (offsets && part_.out)
      weighted_sum<A>(mass, stride, rows_, vectors, delta.data(), c_.ld, out());
  }

 private:
  const A* local_rows() const { return c_.local_queries + row0_ * c_.ld; }
  A* out() const { return part_.out + row0_ * c_.ld; }
  ScalarLse<A> block_lse(int64_t r) const { return {{}, block_max_[r], block_sum_[r]}; }
  void clear_block() {
    for (int64_t r = 0; r < rows_; ++r) {
      block_max_[r] = -A(INFINITY);
      block_sum_[r] = 0;
    }
  }
  void score(const A* x, int64_t count) {
    score_tile<A>(x, count, local_rows(), rows_, c_.ld, c_.scale, scores_, stride_);
  }

  // scores of a slot's k-th passage += bias[k]
  void add_by_kind(A* scores, int64_t count, const A* bias) const {
    const int64_t m = c_.layout.m;
    if (m == 1) {
      const A b = bias[0];
      for (int64_t c = 0; c < count; ++c) scores[c] += b;
      return;
    }
    for (int64_t c = 0; c < count; c += m)
      for (int64_t k = 0; k < m; ++k) scores[c + k] += bias[k];
  }

  // Online softmax over the scored tile. bias and mass: (rows, stride) with m entries for the tile;
  // all_mass with `vectors` entries a row is rescaled together with the sums.
  void absorb(const A* x, int64_t count, const A* bias, int64_t stride, A* mass = nullptr,
              A* all_mass = nullptr, int64_t vectors = 0) {
    const int64_t m = c_.layout.m;
    for (int64_t r = 0; r < rows_; ++r) {
      A* s = scores_ + r * stride_;
      if (bias) add_by_kind(s, count, bias + r * stride);
      const ScalarLse<A> tile = exp_and_lse<A>(s, count);
      A& top = part_.max[row0_ + r];
      A& sum = part_.sum[row0_ + r];
      if (tile.sum == 0) continue;  // every pair masked: the row's weights are all 0
      const A new_top = tile.max > top ? tile.max : top;
      if (new_top > top) {
        const A shrink = top > -A(INFINITY) ? std::exp(top - new_top) : A(0);
        sum *= shrink;
        if (part_.out) {
          scale_row(out() + r * c_.ld, c_.ld, shrink);
          if (all_mass) scale_row(all_mass + r * stride, vectors, shrink);
        }
        top = new_top;
      }
      const A factor = std::exp(tile.max - new_top);
      sum += tile.sum * factor;
      if (!part_.out) continue;
      if (factor != A(1)) scale_row(s, count, factor);
      if (mass && m == 1)
        mass[r * stride] += tile.sum * factor;
      else if (mass)
        for (int64_t c = 0; c < count; c += m)
          for (int64_t k = 0; k < m; ++k) mass[r * stride + k] += s[c + k];
    }
    if (part_.out) weighted_sum<A>(scores_, stride_, rows_, count, x, c_.ld, out());
  }

  const Context<A, S>& c_;
  int64_t row0_, rows_, tile_columns_, stride_;
  QueryPartial<A> part_;
  A* new_rows_;
  Buffer<A> scores_, tile_, block_max_, block_sum_;
};

}  // namespace
}  // namespace contaccum
