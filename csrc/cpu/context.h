// What the parts of a step share.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace contaccum {
namespace {

// Entries of the table that lie side by side, one a row: log-sum-exps and, where they are kept,
// expected scores.
template <class A>
struct Entries {
  A* lse;       // (C)
  A* expected;  // (C)
};

template <class A, class S>
struct Context {
  Layout layout;
  StepOptions options;
  const Plan& plan;
  int64_t n, ld;  // local rows; d padded to whole vectors
  A scale;
  double row_weight;  // w_i

  S* queries;       // (C, d)
  S* passages;      // (C, m, d)
  int64_t* ids;     // (C, m)
  int64_t* cursor;  // (2)
  A* block_lse;     // (blocks, C)
  A* group_lse;     // (groups, C)
  A* row_state;     // (kRowStates, C)
  A* means;         // (2 + offset_blocks, 1 + m, d)
  A* expected;      // (expected_rows, C) or null

  const A* local_queries;    // (n, ld)
  const A* local_passages;   // (n * m, ld)
  const int64_t* local_ids;  // (n, m) or null

  A* row(RowState which) const { return row_state + which * layout.capacity; }
  A* expected_row(ExpectedState which) const {
    return expected_at(layout.blocks() + layout.groups() + which);
  }
  Entries<A> block(int64_t b) const { return {block_lse + b * layout.capacity, expected_at(b)}; }
  Entries<A> group(int64_t k) const {
    return {group_lse + k * layout.capacity, expected_at(layout.blocks() + k)};
  }
  Entries<A> state(RowState which, ExpectedState expects) const {
    return {row(which), expected ? expected_row(expects) : nullptr};
  }
  Entries<A> row_entries() const { return state(kRowLse, kRowExpected); }
  Entries<A> base_entries() const { return state(kBaseLse, kBaseExpected); }
  Entries<A> old_entries() const { return state(kOldLse, kOldExpected); }
  A* mean(int64_t index) const { return means + index * (1 + layout.m) * layout.d; }
  bool masked() const { return local_ids != nullptr; }

 private:
  A* expected_at(int64_t row) const {
    return expected ? expected + row * layout.capacity : nullptr;
  }
};

template <class F>
void for_each_task(int64_t count, const F& task) {
  run_tasks(count, [](int64_t i, const void* f) { (*static_cast<const F*>(f))(i); }, &task);
}

// `rows` vectors of length d as a tile: in place where the bank holds acc without padding, else
// converted into scratch.
template <class A>
const A* as_tile(const A* from, int64_t rows, int64_t d, int64_t ld, A* scratch) {
  if (d == ld) return from;
  convert_rows(from, rows, d, scratch, ld);
  return scratch;
}
template <class A, class S>
const A* as_tile(const S* from, int64_t rows, int64_t d, int64_t ld, A* scratch) {
  convert_rows(from, rows, d, scratch, ld);
  return scratch;
}

// The offsets mean_now - mean_of_block that a run of segments needs: `width` vectors for each
// distinct row of means, from the `first`-th vector of the row (0 queries, 1 .. m passages).
// Segments of a task are neighbours in the ring, so their rows of means come in runs.
template <class A, class S>
class Offsets {
 public:
  Offsets(const Context<A, S>& c, const Segment* begin, const Segment* end, int64_t first,
          int64_t width)
      : width_(width), count_(count_means(begin, end)), vectors_(count_ * width * c.ld) {
    const int64_t d = c.layout.d, vector_count = 1 + c.layout.m;
    int64_t i = -1, last = -1;
    for (const Segment* s = begin; s < end; ++s) {
      if (s->mean == last) continue;
      last = s->mean;
      ++i;
      for (int64_t v = 0; v < width; ++v) {
        const A* now = c.means + (first + v) * d;
        const A* then = c.means + (s->mean * vector_count + first + v) * d;
        A* out = vectors_ + (i * width + v) * c.ld;
        for (int64_t k = 0; k < d; ++k) out[k] = now[k] - then[k];
        for (int64_t k = d; k < c.ld; ++k) out[k] = 0;
      }
    }
  }
  static int64_t count_means(const Segment* begin, const Segment* end) {
    int64_t count = 0;
    for (const Segment* s = begin; s < end; ++s) count += s == begin || s->mean != s[-1].mean;
    return count;
  }
  int64_t vectors() const { return count_ * width_; }
  const A* data() const { return vectors_; }

 private:
  int64_t width_, count_;
  Buffer<A> vectors_;
};

// Leave out the pairs whose column holds the same passage as the row's positive: false negatives.
// `target` is the column that is the row's own positive, or -1.
template <class A>
inline void mask_row(A* scores, const int64_t* column_ids, int64_t columns, int64_t positive_id,
                     int64_t target) {
  if (positive_id == -1) return;
  for (int64_t c = 0; c < columns; ++c)
    if (column_ids[c] == positive_id && c != target) scores[c] = -A(INFINITY);
}

// A score times its weight; nothing for a pair that is left out, of score -inf and weight 0.
template <class A>
inline Vec<A> weighted_(Vec<A> score, Vec<A> weight) {
  return score > -A(INFINITY) ? score * weight : Vec<A>{};
}

// Maximum of scores[0 .. count) and sums of exp(score - max), with kExpect times score too.
template <class A, bool kExpect = false>
inline ScalarLse<A, kExpect> lse_of(const A* scores, int64_t count) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t whole = count / lanes * lanes;
  Vec<A> tail = splat<A>(-A(INFINITY));
  if (whole < count) std::memcpy(&tail, scores + whole, (count - whole) * sizeof(A));
  Vec<A> top = tail;
  for (int64_t c = 0; c < whole; c += lanes) top = max_(top, load(scores + c));
  ScalarLse<A, kExpect> r;
  for (int64_t l = 0; l < lanes; ++l) r.max = r.max > top[l] ? r.max : top[l];
  if (!(r.max > -A(INFINITY))) return r;
  Vec<A> total = exp_<A>(tail - r.max);
  for (int64_t c = 0; c < whole; c += lanes) total += exp_<A>(load(scores + c) - r.max);
  for (int64_t l = 0; l < lanes; ++l) r.sum += total[l];
  if constexpr (kExpect) {
    Vec<A> weighted = weighted_<A>(tail, exp_<A>(tail - r.max));
    for (int64_t c = 0; c < whole; c += lanes) {
      const Vec<A> s = load(scores + c);
      weighted += weighted_<A>(s, exp_<A>(s - r.max));
    }
    for (int64_t l = 0; l < lanes; ++l) r.weighted += weighted[l];
  }
  return r;
}

// The same, and scores replaced by exp(score - max); the row is padded to whole vectors.
template <class A>
inline ScalarLse<A> exp_and_lse(A* scores, int64_t count) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t padded = round_up(count, lanes);
  for (int64_t c = count; c < padded; ++c) scores[c] = -A(INFINITY);
  ScalarLse<A> r;
  Vec<A> top = splat<A>(-A(INFINITY));
  for (int64_t c = 0; c < padded; c += lanes) top = max_(top, load(scores + c));
  for (int64_t l = 0; l < lanes; ++l) r.max = r.max > top[l] ? r.max : top[l];
  const A shift = r.max > -A(INFINITY) ? r.max : A(0);
  Vec<A> total{};
  for (int64_t c = 0; c < padded; c += lanes) {
    const Vec<A> e = exp_<A>(load(scores + c) - shift);
    store(scores + c, e);
    total += e;
  }
  for (int64_t l = 0; l < lanes; ++l) r.sum += total[l];
  return r;
}

// The first `valid` lanes, or all of them where there are as many.
template <class A>
inline Vec<A> load_some(const A* from, int64_t valid) {
  if (valid >= Simd<A>::lanes) return load(from);
  Vec<A> x{};
  std::memcpy(&x, from, valid * sizeof(A));
  return x;
}
template <class A>
inline void store_some(A* to, Vec<A> x, int64_t valid) {
  std::memcpy(to, &x, min_(valid, Simd<A>::lanes) * sizeof(A));
}

// Add entries of the table to log-sum-exps of rows, and store a log-sum-exp as an entry. `row` is
// the first of as many as a vector has, of which `valid` are there.
template <class A, bool kExpect>
inline void add_entries(Lse<A, kExpect>& sum, Entries<A> from, int64_t row, int64_t valid) {
  Lse<A, kExpect> entry;
  entry.max = load_some(from.lse + row, valid);
  entry.sum = entry.max > -A(INFINITY) ? splat<A>(1) : Vec<A>{};
  if constexpr (kExpect) entry.weighted = load_some(from.expected + row, valid);
  sum.add(entry);
}
template <class A, bool kExpect>
inline void store_entries(const Lse<A, kExpect>& sum, Entries<A> to, int64_t row, int64_t valid) {
  store_some(to.lse + row, sum.value(), valid);
  if constexpr (kExpect) store_some(to.expected + row, sum.expected(), valid);
}

// The same for one row.
template <class A, bool kExpect>
inline void add_entry(ScalarLse<A, kExpect>& sum, A lse, A expected) {
  ScalarLse<A, kExpect> entry;
  entry.max = lse;
  entry.sum = A(1);
  if constexpr (kExpect) entry.weighted = expected;
  sum.add(entry);
}
template <class A, bool kExpect>
inline void add_entry(ScalarLse<A, kExpect>& sum, Entries<A> from, int64_t row) {
  add_entry(sum, from.lse[row], kExpect ? from.expected[row] : A(0));
}
template <class A, bool kExpect>
inline void store_entry(const ScalarLse<A, kExpect>& sum, Entries<A> to, int64_t row) {
  to.lse[row] = sum.value();
  if constexpr (kExpect) to.expected[row] = sum.expected();
}

template <class A>
inline A sum_of(const A* x, int64_t count) {
  constexpr int64_t lanes = Simd<A>::lanes;
  Vec<A> total{};
  A sum = 0;
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes) total += load(x + k);
  for (int64_t l = 0; l < lanes; ++l) sum += total[l];
  for (; k < count; ++k) sum += x[k];
  return sum;
}

template <class A>
inline void scale_row(A* x, int64_t count, A factor) {
  for (int64_t k = 0; k < count; ++k) x[k] *= factor;
}

}  // namespace
}  // namespace contaccum
