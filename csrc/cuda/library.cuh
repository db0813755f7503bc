// What the loss needs between matrix products that torch's library computes: scores become
// weights, log-sum-exps and table entries, sums are collected; see library.h.
//
// - A chunk of scores is (local rows, columns) on the query side and (rows, local columns) on the
//   passage side; rows are local or banked. Weights lie where the scores lay unless they are
//   narrower.
// - Slots that are not filled or not in the window have weight 0 rather than no part in a product.
//   That is safe: a bank's buffers begin as zeros and take only finite vectors.
// - An offset is multiplied like a bank vector: with the local vectors for a bias, with the weights
//   of the slots that share it for the gradient. 16-bit banks take it, and those sums of weights,
//   as two numbers: rounded, and what rounding left.
#pragma once

#include "library.h"
#include "reduce.cuh"
#include "upkeep.cuh"

namespace contaccum {

// Rounded, rest: what scores are made of; rounded, rest, rounded: meets rounded, rounded, rest.
template <class S>
constexpr int kHalves = sizeof(S) == 2 ? 2 : 1;
template <class S>
constexpr int kTerms = sizeof(S) == 2 ? 3 : 1;

// Weights are at most 1, most far less: below 6e-5 a half would lose bits.
template <class S>
constexpr float kStoredOne = std::is_same_v<S, F16> ? 32768.f : 1.f;

constexpr int kElementThreads = 256;  // of kernels in which each thread has one element
constexpr int kSurveyThreads = 128;

// Slots [begin, end) by stored mean: piece i is offset block first_block + i, but for what head has
// yet to overwrite of its own, which is the last piece.
struct Pieces {
  int begin, end;
  int first_block, count;

  template <class S>
  __device__ int of(const Ring<S>& ring, int slot) const {
    const int mean = ring.mean_of(slot);
    return mean == 1 + ring.a.offset_blocks ? count - 1 : mean - 1 - first_block;
  }
  template <class S>
  __device__ int mean(const Args<S>& a, int i) const {
    return i == count - 1 ? 1 + a.offset_blocks : 1 + first_block + i;
  }
  // First slot and end of a piece; there may be none.
  template <class S>
  __device__ int2 slots(const Ring<S>& ring, int i) const {
    const int width = ring.a.offset_block, own = ring.head / ring.a.offset_block;
    const bool spare = i == count - 1, divided = ring.head % ring.a.offset_block != 0;
    if (spare && !divided) return {0, 0};
    const int b = spare ? own : first_block + i;
    int from = max(begin, b * width), to = min(min(end, (b + 1) * width), ring.fill);
    if (spare) from = max(from, ring.head);
    if (!spare && b == own && divided) to = min(to, ring.head);
    return {from, max(from, to)};
  }
};

// Offsets of pieces.count x kinds vectors, kTerms of each, (kTerms, pieces, kinds, d); kinds count
// from first_kind. Grid (pieces x kinds, d / kElementThreads).
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    write_offsets(const Args<S> a, const Pieces pieces, int kinds, int first_kind, S* to) {
  const int vector = blockIdx.x, k = blockIdx.y * kElementThreads + threadIdx.x;
  if (k >= a.d) return;
  const int kind = first_kind + vector % kinds;
  const Acc<S> offset = a.mean(0, kind)[k] - a.mean(pieces.mean(a, vector / kinds), kind)[k];
  const int64_t at = int64_t(vector) * a.d + k, term = int64_t(gridDim.x) * a.d;
  S rounded, rest;
  round_to(offset, rounded);
  to[at] = rounded;
  if (kTerms<S> == 1) return;
  round_to(offset - to_acc(rounded), rest);
  to[at + term] = rest;
  to[at + 2 * term] = rounded;
}

// A sum of weights as the kTerms numbers that meet those of an offset, `term` apart.
template <class S>
__device__ void put_mass(Acc<S> mass, S* to, int64_t term) {
  S rounded, rest;
  round_to(mass, rounded);
  to[0] = rounded;
  if (kTerms<S> == 1) return;
  round_to(mass - to_acc(rounded), rest);
  to[term] = rounded;
  to[2 * term] = rest;
}

template <class S>
__device__ __forceinline__ S stored_weight(Acc<S> weight) {
  S to;
  round_to(weight * Acc<S>(kStoredOne<S>), to);
  return to;
}

// sums (rows, d) = shrink * sums + factor * product, shrink (rows) or null for 1; what lies in
// sums does not count at `first`. Grid (rows x d / kElementThreads).
template <class A>
__global__ void __launch_bounds__(kElementThreads)
    add_product(A* sums, const A* product, const A* shrink, A factor, bool first, int rows, int d) {
  const int64_t i = int64_t(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i >= int64_t(rows) * d) return;
  const A part = factor * product[i];
  sums[i] = first ? part : sums[i] * (shrink == nullptr ? A(1) : shrink[i / d]) + part;
}

// --- query side ---

// `rows` local rows against columns [begin, end), flat, of the batch or the bank.
template <class S>
struct QueryChunk {
  using A = Acc<S>;
  bool local, first;  // first: nothing of these rows has been summed yet
  int begin, end;
  int first_row, rows;
  int first_unit, units;  // runs of columns that are summed apart
  Pieces pieces;
  A* scores;               // (rows, columns)
  S* weights;              // (rows, columns)
  A *unit_max, *unit_sum;  // (units, rows)
  A* shrink;               // (rows)
  S* offsets;              // (kTerms, pieces, m, d)
  A* bias;                 // (rows, kHalves, pieces, m); null without offsets
  S* mass;                 // (rows, kTerms, pieces, m)

  __device__ int64_t at(int row, int column) const {
    return int64_t(row) * (end - begin) + column - begin;
  }
};

// The scores of local rows with their own positives, to the accumulation type's precision whatever
// products are allowed to round to: loss and gradient are differences from it. A warp a row.
template <class S>
__global__ void __launch_bounds__(kThreads) score_targets(const Args<S> a) {
  const int64_t row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row >= a.n) return;
  const Acc<S> dot = warp_dot(a.local_queries + row * a.d, a.local_passages + row * a.m * a.d, a.d);
  if (threadIdx.x % 32 == 0) a.local_positive[row] = dot * a.scale;
}

// Without offset; minus infinity for a pair that is left out.
template <class S>
__device__ Acc<S> query_score(const Args<S>& a, const Ring<S>& ring, const QueryChunk<S>& q,
                              int row, int column) {
  const int l = q.first_row + row;
  if (q.local && column == l * a.m) return a.local_positive[l];
  if (!q.local && column >= ring.fill * a.m) return minus_infinity<Acc<S>>();
  if (a.masked()) {
    const int64_t positive = a.local_ids[int64_t(l) * a.m];
    if (positive != -1 && (q.local ? a.local_ids : a.ids)[column] == positive)
      return minus_infinity<Acc<S>>();
  }
  return q.scores[q.at(row, column)] * a.scale;
}

// As the loss sees it.
template <class S>
__device__ Acc<S> score_in_loss(const Args<S>& a, const Ring<S>& ring, const QueryChunk<S>& q,
                                int row, int column, Acc<S> score) {
  if (q.local) return score;
  const int slot = column / a.m;
  if (!a.banked_columns || slot >= ring.fill || !ring.in_window(slot))
    return minus_infinity<Acc<S>>();
  if (q.bias == nullptr) return score;
  const int width = q.pieces.count * a.m;
  const Acc<S>* bias =
      q.bias + int64_t(row) * kHalves<S> * width + q.pieces.of(ring, slot) * a.m + column % a.m;
  Acc<S> whole = bias[0];
  if (kHalves<S> == 2) whole += bias[width];
  return score + whole * a.scale;
}

// Of a thread block; its first thread gets the result.
template <class A>
__device__ Lse<A> merge_threads(Lse<A> lse) {
  __shared__ A max[kSurveyThreads / 32], sum[kSurveyThreads / 32];
  __syncthreads();  // a former result may still be read
  lse.merge_lanes(32);
  if (threadIdx.x % 32 == 0) {
    max[threadIdx.x / 32] = lse.max;
    sum[threadIdx.x / 32] = lse.sum;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kSurveyThreads / 32; ++w) lse.add(max[w], sum[w]);
  return lse;
}

// Log-sum-exps of the units: for the loss, and without offsets for the table. Grid (units, rows).
template <class S>
__global__ void __launch_bounds__(kSurveyThreads)
    survey_scores(const Args<S> a, const QueryChunk<S> q) {
  using A = Acc<S>;
  const Ring<S> ring(a, a.cursor);
  const int row = blockIdx.y, unit = q.first_unit + blockIdx.x;
  constexpr int kColumns = int(kUnitColumns);
  int begin = q.begin + blockIdx.x * kColumns, end = min(begin + kColumns, q.end);
  bool for_table = false;
  if (!q.local) {
    const int b = unit / a.parts, slot = b * a.block + unit % a.parts * a.unit_slots;
    begin = slot * a.m;
    end = min(slot + a.unit_slots, ring.block_end(b)) * a.m;
    for_table = a.incremental && !ring.is_direct(b);
  }
  Lse<A> table, loss;
  for (int c = begin + threadIdx.x; c < end; c += kSurveyThreads) {
    const A s = query_score(a, ring, q, row, c);
    if (for_table) table.add_score(s);
    loss.add_score(score_in_loss(a, ring, q, row, c, s));
  }
  loss = merge_threads(loss);
  if (threadIdx.x == 0) {
    q.unit_max[int64_t(blockIdx.x) * q.rows + row] = loss.max;
    q.unit_sum[int64_t(blockIdx.x) * q.rows + row] = loss.sum;
  }
  if (!for_table) return;
  table = merge_threads(table);
  if (threadIdx.x == 0) a.unit_lse[int64_t(unit) * a.n + q.first_row + row] = table.value();
}

// Take the units into the rows' sums: online softmax by chunks. A warp a row.
template <class S>
__global__ void __launch_bounds__(kThreads) advance_sums(const Args<S> a, const QueryChunk<S> q) {
  using A = Acc<S>;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= q.rows) return;
  Lse<A> chunk;
  for (int u = lane; u < q.units; u += 32)
    chunk.add(q.unit_max[int64_t(u) * q.rows + row], q.unit_sum[int64_t(u) * q.rows + row]);
  chunk.merge_lanes(32);
  if (lane != 0) return;
  const int l = q.first_row + row;
  Lse<A> whole;
  if (!q.first) whole.add(a.part_max[l], a.part_sum[l]);
  const A before = whole.max;
  whole.add(chunk);
  q.shrink[row] = before == whole.max ? A(1) : exp_(before - whole.max);
  a.part_max[l] = whole.max;
  a.part_sum[l] = whole.sum;
}

// Grid (columns / kElementThreads, rows).
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    weigh_columns(const Args<S> a, const QueryChunk<S> q) {
  using A = Acc<S>;
  const Ring<S> ring(a, a.cursor);
  const int row = blockIdx.y, column = q.begin + blockIdx.x * kElementThreads + threadIdx.x;
  if (column >= q.end) return;
  const int l = q.first_row + row;
  const bool own = q.local && column == l * a.m;  // in the sum, not in the product: reduce.cuh
  const A s = score_in_loss(a, ring, q, row, column, query_score(a, ring, q, row, column));
  const A weight = own || s == minus_infinity<A>() ? A(0) : exp_(s - a.part_max[l]);
  q.weights[q.at(row, column)] = stored_weight<S>(weight);
}

// What of the weights lies on each piece and kind. A warp each; grid (pieces x m / kWarps, rows).
template <class S>
__global__ void __launch_bounds__(kThreads)
    weigh_column_pieces(const Args<S> a, const QueryChunk<S> q) {
  using A = Acc<S>;
  const Ring<S> ring(a, a.cursor);
  const int row = blockIdx.y, width = q.pieces.count * a.m;
  const int at = blockIdx.x * kWarps + threadIdx.x / 32;
  if (at >= width) return;
  const int2 slots = q.pieces.slots(ring, at / a.m);
  A sum = 0;
  for (int slot = slots.x + threadIdx.x % 32; slot < slots.y; slot += 32)
    sum += to_acc(q.weights[q.at(row, slot * a.m + at % a.m)]);
  sum = warp_sum(sum) / A(kStoredOne<S>);
  if (threadIdx.x % 32 == 0)
    put_mass<S>(sum, q.mass + int64_t(row) * kTerms<S> * width + at, width);
}

// --- passage side ---

// Rows [begin, end) of the batch or slots of the bank against all columns of the batch.
template <class S>
struct RowChunk {
  using A = Acc<S>;
  bool local;
  int begin, end;
  int columns;
  Pieces pieces;
  A* scores;   // (rows, columns)
  S* weights;  // (rows, columns)
  S* offsets;  // (kTerms, pieces, d)
  A* bias;     // (kHalves, pieces, columns); null without offsets
  S* mass;     // (kTerms, pieces, columns)

  __device__ int64_t at(int row, int column) const {
    return int64_t(row - begin) * columns + column;
  }
};

// The id that a row leaves out, its positive's; -1 for none.
template <class S>
__device__ int64_t positive_id(const Args<S>& a, const RowChunk<S>& r, int row) {
  return a.masked() ? (r.local ? a.local_ids : a.ids)[int64_t(row) * a.m] : -1;
}

// Without offset; minus infinity for a pair that is left out.
template <class S>
__device__ Acc<S> row_score(const Args<S>& a, const RowChunk<S>& r, int64_t positive, int row,
                            int column) {
  if (positive != -1 && a.local_ids[column] == positive) return minus_infinity<Acc<S>>();
  return r.scores[r.at(row, column)] * a.scale;
}

// What a banked row's offset adds.
template <class S>
__device__ Acc<S> row_bias(const Args<S>& a, const Ring<S>& ring, const RowChunk<S>& r, int slot,
                           int column) {
  const Acc<S>* bias = r.bias + int64_t(r.pieces.of(ring, slot)) * r.columns + column;
  Acc<S> whole = bias[0];
  if (kHalves<S> == 2) whole += bias[int64_t(r.pieces.count) * r.columns];
  return whole * a.scale;
}

// A banked row's log-sum-exp, its loss, and what the batch adds to its table, by a warp: what
// BankedRows::run() in rows.cuh does but for the groups.
template <class S>
__device__ double sum_banked_row(const Args<S>& a, const Ring<S>& ring, const RowChunk<S>& r,
                                 int slot, bool upkeep) {
  using A = Acc<S>;
  const int lane = threadIdx.x % 32;
  const bool in_loss = a.banked_rows && ring.in_window(slot);
  if (!in_loss && !upkeep) return 0;
  const int64_t positive = positive_id(a, r, slot);
  Lse<A> loss, fresh;
  if (upkeep) {
    fresh.max = a.row(kFreshMax)[slot];
    fresh.sum = a.row(kFreshSum)[slot];
  }
  for (int row = 0; row < a.n;) {  // the parts of the batch that land in one block
    const int to = upkeep ? ring.slot_of(row) : 0;
    const int end = upkeep ? min(a.n, row + ring.block_end(to / a.block) - to) : a.n;
    Lse<A> plain;
#pragma unroll 1  // or it spills
    for (int c = row * a.m + lane; c < end * a.m; c += 32) {
      const A s = row_score(a, r, positive, slot, c);
      add_entry(plain, s);
      if (r.bias != nullptr) add_entry(loss, s + row_bias(a, ring, r, slot, c));
    }
    plain.merge_lanes(32);
    if (r.bias == nullptr) loss.add(plain);
    fresh.add(plain);
    if (upkeep && to + end - row == ring.block_end(to / a.block)) {
      if (lane == 0) a.block_lse[int64_t(to / a.block) * a.capacity + slot] = fresh.value();
      fresh = Lse<A>{};
    }
    row = end;
  }
  if (upkeep && lane == 0) {
    a.row(kFreshMax)[slot] = fresh.max;
    a.row(kFreshSum)[slot] = fresh.sum;
  }
  if (r.bias != nullptr) loss.merge_lanes(32);
  if (!in_loss || lane != 0) return 0;
  loss.add_lse(a.row(a.banked_columns ? kRowLse : kPositive)[slot]);
  const A lse = loss.value();
  a.row_lse[slot] = lse;
  return double(lse) - double(a.row(kPositive)[slot]);
}

// Grid (rows / kRowsLibrary), losses likewise.
template <class S>
__global__ void __launch_bounds__(kThreads)
    sum_banked_rows(const Args<S> a, const RowChunk<S> r, double* losses) {
  constexpr int kRows = kRowsLibrary;
  const Ring<S> ring(a, a.position);
  const bool upkeep = a.incremental && batch_is_finite(a);
  __shared__ double parts[kWarps];
  const int warp = threadIdx.x / 32, first = r.begin + blockIdx.x * kRows;
  const int end = min(min(first + kRows, r.end), ring.fill);
  double loss = 0;
  for (int slot = first + warp; slot < end; slot += kWarps)
    loss += sum_banked_row(a, ring, r, slot, upkeep);
  if (threadIdx.x % 32 == 0) parts[warp] = loss;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) loss += parts[w];
  losses[blockIdx.x] = loss;
}

// Probabilities, now that the rows' log-sum-exps are known. Grid (rows, columns / kElementThreads).
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    weigh_rows(const Args<S> a, const RowChunk<S> r) {
  using A = Acc<S>;
  const Ring<S> ring(a, a.position);
  const int column = blockIdx.y * kElementThreads + threadIdx.x, row = r.begin + blockIdx.x;
  if (column >= r.columns) return;
  A weight = 0;
  // A row's own target is left out: see weigh_columns().
  if (r.local ? column != row * a.m : row < ring.fill && ring.in_window(row)) {
    A s = row_score(a, r, positive_id(a, r, row), row, column);
    if (r.bias != nullptr) s += row_bias(a, ring, r, row, column);
    weight = exp_(s - (r.local ? a.local_lse : a.row_lse)[row]);
  }
  r.weights[r.at(row, column)] = stored_weight<S>(weight);
}

// What of the weights lies on each piece. Grid (pieces, columns / kElementThreads).
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    weigh_row_pieces(const Args<S> a, const RowChunk<S> r) {
  using A = Acc<S>;
  const Ring<S> ring(a, a.position);
  const int column = blockIdx.y * kElementThreads + threadIdx.x, piece = blockIdx.x;
  if (column >= r.columns) return;
  const int2 slots = r.pieces.slots(ring, piece);
  A sum = 0;
#pragma unroll 4
  for (int slot = slots.x; slot < slots.y; ++slot) sum += to_acc(r.weights[r.at(slot, column)]);
  put_mass<S>(sum / A(kStoredOne<S>), r.mass + int64_t(piece) * r.columns + column,
              int64_t(r.pieces.count) * r.columns);
}

// --- upkeep ---

// Items [first, first + count) of the upkeep, a group's room for each.
template <class S>
struct KeptItems {
  using A = Acc<S>;
  int first, count, most;  // more than `most` in a step are not these kernels' to keep
  S* gathered;             // (count, group, m, d)
  int begin, end;          // banked rows
  const A* scores;         // (rows, count, group, m)
};

// Columns that no item has become zeros. Grid (count x group).
template <class S>
__global__ void __launch_bounds__(kElementThreads)
    gather_items(const Args<S> a, const KeptItems<S> kept) {
  const Ring<S> ring(a, a.position);
  const Upkeep<S> upkeep(ring);
  const int block = blockIdx.x, i = kept.first + block / a.group, at = block % a.group;
  UpkeepItem item{0, 0, -1};
  if (i < upkeep.count()) item = upkeep.item(i);
  const bool filled = item.begin + at < item.end;
  const int64_t width = int64_t(a.m) * a.d;
  const S* from = a.passages + int64_t(item.begin + at) * width;
  S* to = kept.gathered + blockIdx.x * width;
  for (int64_t k = threadIdx.x; k < width; k += kElementThreads) {
    S zero;
    round_to(Acc<S>(0), zero);
    to[k] = filled ? from[k] : zero;
  }
}

// Log-sum-exps of banked rows over items, into the table. A warp a row, `width` lanes an item at a
// time. Grid (rows / kWarps).
template <class S>
__global__ void __launch_bounds__(kThreads)
    keep_items(const Args<S> a, const KeptItems<S> kept, int width) {
  using A = Acc<S>;
  const Ring<S> ring(a, a.position);
  const Upkeep<S> upkeep(ring);
  if (!batch_is_finite(a) || upkeep.count() > kept.most) return;
  const int slot = kept.begin + blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (slot >= min(kept.end, ring.fill)) return;
  const int64_t positive_id = a.masked() ? a.ids[int64_t(slot) * a.m] : -1;
  const int columns = a.group * a.m, items = 32 / width;
  const A* row = kept.scores + int64_t(slot - kept.begin) * kept.count * columns;
  const int end = min(kept.count, upkeep.count() - kept.first);
  for (int i = 0; i < end; i += items) {  // the same for all lanes: they shuffle
    const int mine = i + lane / width;
    UpkeepItem item{0, 0, -1};
    if (mine < end) item = upkeep.item(kept.first + mine);
    Lse<A> lse;
    for (int c = lane % width; c < (item.end - item.begin) * a.m; c += width) {
      const int column = item.begin * a.m + c;
      // The row's own positive as precise as where the loss takes it away again.
      if (column == slot * a.m)
        lse.add_score(a.row(kPositive)[slot]);
      else if (positive_id == -1 || a.ids[column] != positive_id)
        lse.add_score(row[int64_t(mine) * columns + c] * a.scale);
    }
    lse.merge_lanes(width);
    if (mine >= end || lane % width != 0) continue;
    if (item.group < 0)
      a.row(kOldLse)[slot] = lse.value();
    else
      a.group_lse[int64_t(item.group) * a.capacity + slot] = lse.value();
  }
}

}  // namespace contaccum
