// What follows the two streaming passes: partial sums are added up in a fixed order, the batch is
// written into the bank, the running means move on.
//
// - finish_queries: a local row's log-sum-exp, loss and gradient from the splits of the query side;
//   whether it may enter the bank; a copy of head and fill for the kernels after it.
// - finish_passages: a local column's gradient; beside it, in other thread blocks of the same
//   launch, the loss, the batch, the means and the cursor.
// - Nothing here is read by a thread block of the same launch that another one writes.
#pragma once

#include "online_softmax.cuh"
#include "ring.cuh"

namespace contaccum {

// A thread block adds up C elements of one vector, kThreads / C places at a time: more where there
// are vectors enough to fill the device.
constexpr int kFewColumns = 32, kManyColumns = 128;
inline int sum_columns_of(int64_t locals) { return locals < 64 ? kFewColumns : kManyColumns; }

// Neither pass has a row's own target in its sums: with probability P it counts P - 1, which is
// small where training has succeeded and must not be left over from a rounded P.

// Where part_out has element k of local vector `row` at the first place.
template <class S>
__device__ int64_t part_out_at(const Args<S>& a, int row, int k, int slice) {
  constexpr int kRows = 64;
  if (slice == 0) return int64_t(row) * a.d + k;
  const int slices = (a.d + slice - 1) / slice;
  const int64_t part = int64_t(row / kRows) * slices + k / slice;
  return (part * kRows + row % kRows) * slice + k % slice;
}

// Sum over places of weight(place) * part_out[place, row, k] for the thread's k; every thread of
// the column gets it. `of` is the number of rows.
template <int C, class S, class Weight>
__device__ Acc<S> sum_places(const Args<S>& a, int places, int slice, int row, int of, int k,
                             Weight weight) {
  using A = Acc<S>;
  constexpr int kLanes = kThreads / C;
  __shared__ A sums[kLanes][C];
  const int column = threadIdx.x % C, group = threadIdx.x / C;
  const A* from = a.part_out + part_out_at(a, row, k, slice);
  const int64_t stride = a.place_size(of, slice);
  A sum = 0;
  if (k < a.d)
#pragma unroll 8  // loads in flight
    for (int p = group; p < places; p += kLanes) sum += weight(p) * from[p * stride];
  sums[group][column] = sum;
  __syncthreads();
  A total = 0;
  for (int g = 0; g < kLanes; ++g) total += sums[g][column];
  return total;
}

// Inner product of two vectors of the batch, by a warp.
template <class S>
__device__ Acc<S> warp_dot(const S* x, const S* y, int d) {
  Acc<S> sum = 0;
  for (int k = threadIdx.x % 32; k < d; k += 32) sum += to_acc(x[k]) * to_acc(y[k]);
  return warp_sum(sum);
}

// Grid (n, d / C).
template <class S, int C>
__global__ void __launch_bounds__(kThreads) finish_queries(const Args<S> a) {
  using A = Acc<S>;
  const int row = blockIdx.x, splits = a.local_splits + a.bank_splits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const S* q = a.local_queries + int64_t(row) * a.d;
  const S* positive = a.local_passages + int64_t(row) * a.m * a.d;
  __shared__ A shared_lse, shared_positive;
  __shared__ int bad;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  if (warp == 0) {
    Lse<A> lse;
    for (int s = lane; s < splits; s += 32)
      lse.add(a.part_max[int64_t(s) * a.n + row], a.part_sum[int64_t(s) * a.n + row]);
    lse.merge_lanes(32);
    if (lane == 0) shared_lse = lse.value();
  } else if (warp == 1) {
    const A dot = warp_dot(q, positive, a.d);
    if (lane == 0) shared_positive = dot * a.scale;
  } else if (blockIdx.y == 0) {
    for (int v = warp - 2; v <= a.m; v += kWarps - 2) {
      const S* x = v == a.m ? q : positive + int64_t(v) * a.d;
      if (!isfinite(warp_dot(x, x, a.d) * a.scale)) bad = 1;  // all write the same
    }
  }
  __syncthreads();
  const A lse = shared_lse;
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    a.local_lse[row] = lse;
    a.local_positive[row] = shared_positive;
    a.losses[row] = double(lse) - double(shared_positive);
    a.not_finite[row] = bad;
    if (row == 0) {
      a.position[0] = a.cursor[0];
      a.position[1] = a.cursor[1];
    }
  }
  if (!a.with_grad) return;
  const int k = blockIdx.y * C + threadIdx.x % C;
  __shared__ A weights[kMaxSplits + 1];
  const int places = a.places(splits, a.query_slice);
  for (int p = threadIdx.x; p < places; p += kThreads) {
    const int sharing = a.query_slice ? 1 << a.sharing : 1;
    const A top = a.max_of_splits(p * sharing, min((p + 1) * sharing, splits), row);
    weights[p] = top == minus_infinity<A>() ? A(0) : exp_(top - lse);
  }
  __syncthreads();
  const A sum =
      sum_places<C>(a, places, a.query_slice, row, a.n, k, [&](int p) { return weights[p]; });
  if (k >= a.d || threadIdx.x >= C) return;
  const A factor = A(Ring<S>(a, a.cursor).row_weight()) * a.scale;
  const A own = expm1_(shared_positive - lse) * to_acc(positive[k]);
  a.d_queries[int64_t(row) * a.d + k] = factor * (sum + own);
}

// dp = scale * w * sum over rows of P row, the own query of a positive with P - 1
template <int C, class S>
__device__ void finish_column(const Args<S>& a, int column, int chunk, bool refused) {
  using A = Acc<S>;
  const int k = chunk * C + threadIdx.x % C;
  const int places = a.places(a.gradient_local + a.gradient_bank, a.passage_slice);
  const A sum =
      sum_places<C>(a, places, a.passage_slice, column, a.n * a.m, k, [](int) { return A(1); });
  if (k >= a.d || threadIdx.x >= C) return;
  const int row = column / a.m;
  const A own = column % a.m ? A(0)
                             : expm1_(a.local_positive[row] - a.local_lse[row]) *
                                   to_acc(a.local_queries[int64_t(row) * a.d + k]);
  const A factor = A(Ring<S>(a, a.position).row_weight()) * a.scale;
  a.d_passages[int64_t(column) * a.d + k] = refused ? not_a_number<A>() : factor * (sum + own);
}

// The loss, summed in the same order whatever runs beside it; and where the ring stands now.
template <class S>
__device__ void finish_loss(const Args<S>& a, bool enqueue, bool refused) {
  using A = Acc<S>;
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int i = threadIdx.x; i < a.n + a.row_blocks; i += kThreads) sum += a.losses[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const Ring<S> ring(a, a.position);
  *a.loss = refused ? not_a_number<A>() : A(sums[0] * ring.row_weight());
  if (!enqueue) return;
  const Ring<S> next = ring.after();
  a.cursor[0] = next.head;
  a.cursor[1] = next.fill;
}

template <class S>
__device__ void refuse_row(const Args<S>& a, int row) {
  if (!a.with_grad) return;
  for (int k = threadIdx.x; k < a.d; k += kThreads)
    a.d_queries[int64_t(row) * a.d + k] = not_a_number<Acc<S>>();
}

// A row of the batch into its slot.
template <class S>
__device__ void write_row(const Args<S>& a, int row) {
  const Ring<S> ring(a, a.position);
  if (row < a.n - ring.count()) return;
  const int64_t slot = ring.slot_of(row), width = int64_t(a.m) * a.d;
  for (int k = threadIdx.x; k < a.d; k += kThreads)
    a.queries[slot * a.d + k] = a.local_queries[int64_t(row) * a.d + k];
  for (int64_t k = threadIdx.x; k < width; k += kThreads)
    a.passages[slot * width + k] = a.local_passages[row * width + k];
  for (int k = threadIdx.x; k < a.m; k += kThreads)
    a.ids[slot * a.m + k] = a.masked() ? a.local_ids[int64_t(row) * a.m + k] : -1;
}

// kMeanColumns elements of (1 + m, d): the running mean, then the means stored with offset blocks.
// The slots of an offset block share the average of the running means they were enqueued at. All n
// rows are stamped, also those that later rows of a large batch have overwritten.
constexpr int kMeanColumns = 32;  // few: lanes share the rows, and latency decides
template <class S>
__device__ void move_means(const Args<S>& a, int block) {
  using A = Acc<S>;
  constexpr int kLanes = kThreads / kMeanColumns;
  __shared__ A sums[kLanes][kMeanColumns];
  const int64_t width = int64_t(1 + a.m) * a.d;
  const int column = threadIdx.x % kMeanColumns, first = threadIdx.x / kMeanColumns;
  const int64_t at = int64_t(block) * kMeanColumns + column;
  if (a.drift_decay >= A(0)) {
    A sum = 0;
    if (at < width) {
      const int v = int(at / a.d), k = int(at % a.d);
      const S* x = v == 0 ? a.local_queries + k : a.local_passages + int64_t(v - 1) * a.d + k;
      const int64_t stride = v == 0 ? a.d : int64_t(a.m) * a.d;
#pragma unroll 8  // loads in flight
      for (int i = first; i < a.n; i += kLanes) sum += to_acc(x[i * stride]);
    }
    sums[first][column] = sum;
    __syncthreads();
  }
  if (at >= width || first > 0) return;
  const Ring<S> ring(a, a.position);
  if (a.drift_decay >= A(0)) {
    A sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane][column];
    const A keep = ring.fill > 0 ? a.drift_decay : A(0);
    a.means[at] = keep * a.means[at] + (A(1) - keep) * sum / A(a.n);
  }
  const A now = a.means[at];
  int slot = ring.head;
  for (int row = 0; row < a.n;) {
    const int b = slot / a.offset_block, before = slot - b * a.offset_block;
    const int block_end = min((b + 1) * a.offset_block, int(a.capacity));
    const int end = a.n - row < block_end - slot ? slot + a.n - row : block_end;
    A* stored = a.means + (1 + b) * width + at;
    if (before == 0) a.means[(1 + a.offset_blocks) * width + at] = *stored;
    const A share = A(end - slot) / A(before + end - slot);
    *stored = before == 0 ? now : *stored + share * (now - *stored);
    row += end - slot;
    slot = end == a.capacity ? 0 : end;
  }
}

// A thread block's part: the first has the loss; then n have rows to write and others elements of
// the means, if enqueueing; then (n * m, d / C) have sums, if gradients are wanted.
template <int C, class S>
__device__ void finish(const Args<S>& a, int role) {
  const bool enqueue = a.enqueue && batch_is_finite(a);
  // A batch that may not enter the bank must not look sound: whoever watches the loss or, as loss
  // scaling does, the gradients shall see it.
  const bool refused = a.enqueue && !enqueue;
  if (role-- == 0) return finish_loss(a, enqueue, refused);
  if (a.enqueue) {
    const int mean_blocks = (int64_t(1 + a.m) * a.d + kMeanColumns - 1) / kMeanColumns;
    if (role < a.n + mean_blocks) {
      if (role < a.n) return enqueue ? write_row(a, role) : refuse_row(a, role);
      if (!enqueue) return;
      return move_means(a, role - a.n);
    }
    role -= a.n + mean_blocks;
  }
  const int chunks = (a.d + C - 1) / C;
  finish_column<C>(a, role / chunks, role % chunks, refused);
}

template <class S, int C>
__global__ void __launch_bounds__(kThreads) finish_passages(const Args<S> a) {
  finish<C>(a, blockIdx.x);
}

}  // namespace contaccum
