// One step of the op, in order: what no longer fits is rebuilt; query side; passage side with the
// upkeep of the rows that stay; the batch is written; the new rows' entries; means; cursor.
#pragma once

#include "passage_side.h"
#include "query_side.h"
#include "row_state.h"

namespace contaccum {
namespace {

// At most this many partial sums for one output row: their size must not grow with the bank, and
// their number must not depend on the number of threads, so that results do not either.
constexpr int64_t kMaxSplits = 32;
constexpr int64_t kPartialBytes = 16 << 20;

inline int64_t split_begin(int64_t count, int64_t splits, int64_t i) { return count * i / splits; }

// Like split_begin over segments, moved forward to the start of a block: a block's table entry is
// summed in one task.
inline int64_t block_split(const std::vector<Segment>& list, int64_t splits, int64_t i) {
  const int64_t count = list.size();
  int64_t at = split_begin(count, splits, i);
  while (at > 0 && at < count && list[at].block == list[at - 1].block) ++at;
  return at;
}

template <class A, class S>
class Step {
 public:
  Step(Context<A, S>& c, const StepOutput& out)
      : c_(c),
        loss_(static_cast<A*>(out.loss)),
        dq_(static_cast<A*>(out.d_queries)),
        dp_(static_cast<A*>(out.d_passages)),
        d_scale_(static_cast<A*>(out.d_scale)),
        lse_(c.n) {}

  // The batch in the bank's own type, to be enqueued. kExpect: expected scores are kept.
  template <bool kExpect>
  void run(const Batch& batch) {
    const bool masked = c_.masked();
    const RingView before{c_.plan.head, c_.plan.fill, &c_.plan.window_blocks};
    if (c_.options.rebuild == Rebuild::table) rebuild_table<kExpect>(c_, before, masked);
    if (c_.options.rebuild == Rebuild::window) finish_rows<kExpect>(c_, before, true, false);

    const bool enqueue = c_.options.enqueue && all_finite(batch);
    const bool incremental = enqueue && !c_.plan.rebuild_after;
    Buffer<A> new_rows(incremental ? c_.n * c_.layout.blocks() : 0);
    query_side(incremental ? static_cast<A*>(new_rows) : nullptr);
    passage_side(incremental);
    *loss_ = A(total_loss_ * c_.row_weight);
    if (d_scale_) *d_scale_ = A((local_scale_term() + scale_term_ * c_.row_weight) / c_.scale);
    if (c_.options.enqueue && !enqueue) refuse();
    if (!enqueue) return;
    write_batch(static_cast<const S*>(batch.queries), static_cast<const S*>(batch.passages));
    const RingView after{c_.plan.next_head, c_.plan.next_fill, &c_.plan.next_window_blocks};
    if (incremental) {
      finish_rows<kExpect>(c_, after, c_.plan.crosses, true);
      enter_rows<kExpect>(after, new_rows);
    } else {
      rebuild_table<kExpect>(c_, after, masked);
    }
    c_.cursor[0] = after.head;
    c_.cursor[1] = after.fill;
  }

 private:
  // A batch that may not enter the bank must not look sound: whoever watches the loss or, as loss
  // scaling does, the gradients shall see it.
  void refuse() {
    const int64_t rows = c_.n, columns = c_.n * c_.layout.m, d = c_.layout.d;
    *loss_ = A(NAN);
    for (int64_t i = 0; dq_ && i < rows * d; ++i) dq_[i] = A(NAN);
    for (int64_t i = 0; dp_ && i < columns * d; ++i) dp_[i] = A(NAN);
    if (d_scale_) *d_scale_ = A(NAN);
  }

  // By Cauchy-Schwarz no score overflows when no scaled squared norm does.
  bool all_finite(const Batch& batch) const {
    const int64_t d = c_.layout.d, companions = c_.n * batch.companion_count;
    Buffer<A> beside(companions * c_.ld);
    convert_rows(static_cast<const S*>(batch.companions), companions, d, static_cast<A*>(beside),
                 c_.ld);
    const int64_t passages = c_.n + c_.n * c_.layout.m, total = passages + companions;
    for (int64_t i = 0; i < total; ++i) {
      const A* x = i < c_.n       ? c_.local_queries + i * c_.ld
                   : i < passages ? c_.local_passages + (i - c_.n) * c_.ld
                                  : beside + (i - passages) * c_.ld;
      A norm = 0;
      for (int64_t k = 0; k < c_.ld; ++k) norm += x[k] * x[k];
      if (!std::isfinite(norm * c_.scale)) return false;
    }
    return true;
  }

  // What scale * dL / dscale has of the local rows: a row's w (sum_j P_j s_j - s_target) is
  // <q, dq>, offsets included.
  double local_scale_term() const {
    double sum = 0;
    for (int64_t r = 0; r < c_.n; ++r)
      for (int64_t k = 0; k < c_.layout.d; ++k)
        sum += double(c_.local_queries[r * c_.ld + k]) * double(dq_[r * c_.layout.d + k]);
    return sum;
  }

  void query_side(A* new_rows) {
    const int64_t n = c_.n, ld = c_.ld, m = c_.layout.m;
    const int64_t row_tasks = (n + kQueryRows - 1) / kQueryRows;
    const int64_t tiles = c_.plan.columns.size();
    int64_t splits = (kMaxSplits + row_tasks - 1) / row_tasks;
    if (splits > tiles) splits = tiles > 0 ? tiles : 1;
    Buffer<A> max(splits * n), sum(splits * n), out(dq_ ? splits * n * ld : 0);
    for_each_task(row_tasks * splits, [&](int64_t i) {
      const int64_t split = i % splits, row0 = i / splits * kQueryRows;
      const QueryPartial<A> part{max + split * n, sum + split * n,
                                 dq_ ? out + split * n * ld : nullptr};
      QueryTask<A, S> task(c_, row0, min_(row0 + kQueryRows, n), part, new_rows);
      if (split == 0) task.local_columns();
      const Segment* list = c_.plan.columns.data();
      task.banked_columns(list + block_split(c_.plan.columns, splits, split),
                          list + block_split(c_.plan.columns, splits, split + 1));
    });
    const A factor = A(c_.row_weight) * c_.scale;
    Buffer<A> row(ld);
    for (int64_t r = 0; r < n; ++r) {
      ScalarLse<A> lse;
      for (int64_t s = 0; s < splits; ++s) lse.add({{}, max[s * n + r], sum[s * n + r]});
      lse_[r] = lse.value();
      const A* q = c_.local_queries + r * ld;
      const A* positive = c_.local_passages + r * m * ld;
      A dot = 0;
      for (int64_t k = 0; k < ld; ++k) dot += q[k] * positive[k];
      total_loss_ += double(lse_[r]) - double(dot * c_.scale);
      if (!dq_) continue;
      for (int64_t k = 0; k < ld; ++k) row[k] = -positive[k];
      for (int64_t s = 0; s < splits; ++s) {
        const A weight = std::exp(max[s * n + r] - lse_[r]);
        const A* partial = out + (s * n + r) * ld;
        for (int64_t k = 0; k < ld; ++k) row[k] += weight * partial[k];
      }
      for (int64_t k = 0; k < c_.layout.d; ++k) dq_[r * c_.layout.d + k] = factor * row[k];
    }
  }

  void passage_side(bool upkeep) {
    const bool banked_loss = c_.options.banked_rows && c_.plan.rows_in_window > 0;
    const std::vector<Segment>& rows = c_.plan.rows;
    const int64_t tiles = banked_loss || upkeep ? int64_t(rows.size()) : 0;
    const int64_t columns = c_.n * c_.layout.m, ld = c_.ld;
    if (!dp_ && tiles == 0) return;
    Packed packed(upkeep ? upkeep_count() : 0, ld);
    if (upkeep) pack_upkeep(packed);
    const UpkeepColumns<A> extra{packed.vectors, packed.ids, packed.count};
    const UpkeepColumns<A>* extra_or_null = upkeep ? &extra : nullptr;

    const int64_t fit = kPartialBytes / (columns * ld * int64_t(sizeof(A)));
    const bool one_pass = !dp_ || fit >= kMaxSplits / 4;
    int64_t splits = dp_ && one_pass ? min_(fit, kMaxSplits) : kMaxSplits;
    splits = tiles > 0 ? min_(splits, tiles) : 1;
    Buffer<A> sums(dp_ && one_pass ? splits * columns * ld : 0);
    Buffer<A> row_lse(one_pass ? 0 : c_.plan.fill);
    Buffer<double> losses(splits), scale_terms(splits);
    const Segment* list = rows.data();
    for_each_task(splits, [&](int64_t s) {
      A* sum = dp_ && one_pass ? sums + s * columns * ld : nullptr;
      PassageTask<A, S> task(c_, one_pass ? PassagePass::whole : PassagePass::scores, 0, columns,
                             sum, row_lse, extra_or_null);
      task.local_rows(split_begin(c_.n, splits, s), split_begin(c_.n, splits, s + 1), lse_);
      task.banked_rows(list + split_begin(tiles, splits, s),
                       list + split_begin(tiles, splits, s + 1));
      losses[s] = task.loss();
      scale_terms[s] = task.scale_term();
    });
    for (int64_t s = 0; s < splits; ++s) {
      total_loss_ += losses[s];
      scale_term_ += scale_terms[s];
    }
    if (!dp_) return;
    if (one_pass) {
      for_each_task((columns + 15) / 16, [&](int64_t i) {
        for (int64_t col = i * 16; col < min_((i + 1) * 16, columns); ++col) {
          A* total = sums + col * ld;
          for (int64_t s = 1; s < splits; ++s)
            for (int64_t k = 0; k < ld; ++k) total[k] += sums[(s * columns + col) * ld + k];
          finish_column(col, total);
        }
      });
      return;
    }
    constexpr int64_t width = 128;  // columns whose sums stay in the second cache level
    for_each_task((columns + width - 1) / width, [&](int64_t i) {
      const int64_t column0 = i * width, column1 = min_(column0 + width, columns);
      Buffer<A> sum((column1 - column0) * ld);
      PassageTask<A, S> task(c_, PassagePass::gradients, column0, column1, sum, row_lse, nullptr);
      task.local_rows(0, c_.n, lse_);
      if (banked_loss) task.banked_rows(list, list + tiles);
      for (int64_t col = column0; col < column1; ++col)
        finish_column(col, sum + (col - column0) * ld);
    });
  }

  // dp = scale * w * (sum over rows of P row - own query for a positive)
  void finish_column(int64_t column, const A* sum) {
    const int64_t m = c_.layout.m, d = c_.layout.d;
    const A factor = A(c_.row_weight) * c_.scale;
    const A own = column % m == 0 ? A(1) : A(0);
    const A* q = c_.local_queries + column / m * c_.ld;
    for (int64_t k = 0; k < d; ++k) dp_[column * d + k] = factor * (sum[k] - own * q[k]);
  }

  struct Packed {
    Packed(int64_t n, int64_t ld) : vectors(n * ld), ids(n), count(n) {}
    Buffer<A> vectors;
    Buffer<int64_t> ids;
    int64_t count;
  };
  int64_t upkeep_count() const {
    int64_t count = 0;
    for (const UpkeepGroup& g : c_.plan.upkeep) count += (g.end - g.begin) * c_.layout.m;
    return count;
  }
  void pack_upkeep(const Packed& packed) const {
    const int64_t m = c_.layout.m, d = c_.layout.d;
    int64_t at = 0;
    for (const UpkeepGroup& g : c_.plan.upkeep) {
      const int64_t count = (g.end - g.begin) * m;
      convert_rows(c_.passages + g.begin * m * d, count, d, packed.vectors + at * c_.ld, c_.ld);
      std::memcpy(packed.ids + at, c_.ids + g.begin * m, count * sizeof(int64_t));
      at += count;
    }
  }

  void write_batch(const S* queries, const S* passages) {
    const int64_t m = c_.layout.m, d = c_.layout.d;
    for (const Piece& piece : c_.plan.pieces) {
      const int64_t count = piece.end - piece.begin;
      std::memcpy(c_.queries + piece.begin * d, queries + piece.row * d, count * d * sizeof(S));
      std::memcpy(c_.passages + piece.begin * m * d, passages + piece.row * m * d,
                  count * m * d * sizeof(S));
      for (int64_t i = 0; i < count * m; ++i)
        c_.ids[piece.begin * m + i] = c_.masked() ? c_.local_ids[piece.row * m + i] : -1;
    }
    if (c_.options.drift_decay >= 0) update_running_mean();
    stamp_means();
  }

  void update_running_mean() {
    const int64_t m = c_.layout.m, d = c_.layout.d;
    const A keep = c_.plan.fill > 0 ? A(c_.options.drift_decay) : A(0);
    A* mean = c_.mean(0);
    for (int64_t v = 0; v <= m; ++v)
      for (int64_t k = 0; k < d; ++k) {
        A sum = 0;
        for (int64_t i = 0; i < c_.n; ++i)
          sum += v == 0 ? c_.local_queries[i * c_.ld + k]
                        : c_.local_passages[(i * m + v - 1) * c_.ld + k];
        mean[v * d + k] = keep * mean[v * d + k] + (1 - keep) * sum / A(c_.n);
      }
  }

  // The slots of an offset block share the average of the running means they were enqueued at. All
  // n rows are stamped, also those that later rows of a large batch have overwritten.
  void stamp_means() {
    const int64_t width = (1 + c_.layout.m) * c_.layout.d;
    const int64_t size = c_.layout.offset_block, capacity = c_.layout.capacity;
    const A* now = c_.mean(0);
    int64_t slot = c_.plan.head;
    for (int64_t row = 0; row < c_.n;) {
      const int64_t block = slot / size, before = slot - block * size;
      const int64_t end = min_(min_((block + 1) * size, capacity), slot + c_.n - row);
      A* stored = c_.mean(1 + block);
      if (before == 0)
        std::memcpy(c_.mean(1 + c_.layout.offset_blocks()), stored, width * sizeof(A));
      const A share = A(end - slot) / A(before + end - slot);
      for (int64_t k = 0; k < width; ++k)
        stored[k] = before == 0 ? now[k] : stored[k] + share * (now[k] - stored[k]);
      row += end - slot;
      slot = end % capacity;
    }
  }

  // The entries of the rows just written.
  template <bool kExpect>
  void enter_rows(const RingView& after, const A* new_rows) {
    constexpr int64_t rows = RowBuilder<A, S, kExpect>::kRows;
    const int64_t m = c_.layout.m, blocks = c_.layout.blocks(), first = c_.n - c_.plan.count;
    for_each_task((c_.plan.count + rows - 1) / rows, [&](int64_t task) {
      RowBuilder<A, S, kExpect> builder(c_, after);
      int64_t slots[rows], positive_ids[rows];
      const int64_t begin = first + task * rows, count = min_(rows, c_.n - begin);
      Buffer<A> score(4);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = begin + r, slot = (c_.plan.head + row) % c_.layout.capacity;
        slots[r] = slot;
        positive_ids[r] = c_.masked() ? c_.local_ids[row * m] : -1;
        score_tile<A>(c_.local_passages + row * m * c_.ld, 1, c_.local_queries + row * c_.ld, 1,
                      c_.ld, c_.scale, score, 4);
        c_.row(kPositive)[slot] = score[0];
        for (int64_t b = 0; b < blocks; ++b)
          if (!c_.plan.direct[b])
            c_.block_lse[b * c_.layout.capacity + slot] =
                b * c_.layout.block < c_.plan.fill ? new_rows[row * blocks + b] : -A(INFINITY);
      }
      const RowSet<A> set{c_.local_queries + begin * c_.ld, slots,
                          c_.masked() ? positive_ids : nullptr, count};
      builder.score_blocks(set, c_.plan.direct.data());
      builder.combine(set);
    });
  }

  Context<A, S>& c_;
  A* loss_;
  A* dq_;
  A* dp_;
  A* d_scale_;
  Buffer<A> lse_;
  double total_loss_ = 0, scale_term_ = 0;
};

template <class A, class S>
void step_typed(const StepArgs& args, const Plan& plan) {
  const Layout& layout = args.layout;
  const StepOptions& options = args.options;
  const BankState& state = args.state;
  const Batch& batch = args.batch;
  const int64_t n = batch.n, m = layout.m, ld = round_up(layout.d, Simd<A>::lanes);
  const S* queries = static_cast<const S*>(batch.queries);
  const S* passages = static_cast<const S*>(batch.passages);
  Buffer<A> local_queries(n * ld), local_passages(n * m * ld);
  convert_rows(queries, n, layout.d, static_cast<A*>(local_queries), ld);
  convert_rows(passages, n * m, layout.d, static_cast<A*>(local_passages), ld);
  const int64_t rows = n + (options.banked_rows ? plan.rows_in_window : 0);
  Context<A, S> c{layout,
                  options,
                  plan,
                  n,
                  ld,
                  A(options.scale),
                  1.0 / double(options.weight_all_rows ? rows : n),
                  static_cast<S*>(state.queries),
                  static_cast<S*>(state.passages),
                  state.ids,
                  state.cursor,
                  static_cast<A*>(state.block_lse),
                  static_cast<A*>(state.group_lse),
                  static_cast<A*>(state.row_state),
                  static_cast<A*>(state.means),
                  static_cast<A*>(state.expected),
                  local_queries,
                  local_passages,
                  batch.ids};
  Step<A, S> step(c, args.out);
  if (options.keep_expected)
    step.template run<true>(batch);
  else
    step.template run<false>(batch);
}

}  // namespace

void CONTACCUM_STEP(const StepArgs& args, const Plan& plan) {
  switch (args.storage) {
    case Storage::f32:
      return step_typed<float, float>(args, plan);
    case Storage::f64:
      return step_typed<double, double>(args, plan);
    case Storage::bf16:
      return step_typed<float, Bf16>(args, plan);
    case Storage::f16:
      return step_typed<float, F16>(args, plan);
  }
}

}  // namespace contaccum
