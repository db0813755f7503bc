// One side of the loss for any dtype and any d up to 4096: a few local vectors against a run of
// bank vectors, and the weighted sum of the latter.
//
// - Query side: local rows over passages, attention with keys = values; online softmax. Passage
//   side: local columns over query rows whose log-sum-exp is known, so weights are final.
// - A thread block holds kLocals local vectors and the sums for them in registers, each thread DPT
//   elements of every sum; the tile it reads twice comes from the first cache level the second
//   time.
// - An offset shared by a run of slots is one more column: its score is a bias, its weight the
//   mass.
#pragma once

#include "online_softmax.cuh"
#include "ring.cuh"
#include "warp_tile.cuh"

namespace contaccum {

template <class S, bool kQuerySide, int DPT, int V>
class Attend {
  using A = Acc<S>;
  static constexpr int L = kLocals<A>, T = kTileRows<A>;
  static constexpr int kTile = kWarps * T;  // bank vectors at once
  static_assert(L <= kWarps, "each local vector needs a warp for its softmax");

 public:
  // Two copies of everything: a warp may fill the next tile while others still sum this one.
  struct Shared {
    A weight[2][kTile * L];  // (tile, L) scores, then weights
    A bias[2][kTile * L];    // (kinds, L)
    A mass[2][kTile * L];    // (kinds, L)
    A shrink[2][L];
  };

  __device__ Attend(const Args<S>& args, Shared& shared)
      : a(args),
        sh(shared),
        total(kQuerySide ? args.n : args.n * args.m),
        first(blockIdx.y * L),
        last(min(first + L, total) - 1),
        locals(kQuerySide ? args.local_queries : args.local_passages),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {}

  __device__ void local_tiles(int split, int splits) {
    const int vectors = kQuerySide ? a.n * a.m : a.n;
    const int begin = int(int64_t(vectors) * split / splits);
    const int end = int(int64_t(vectors) * (split + 1) / splits);
    const S* x = kQuerySide ? a.local_passages : a.local_queries;
    for (int j = begin; j < end; j += kTile)
      tile({x, j, min(kTile, end - j), 1, -1, true, true, false});
  }

  __device__ void banked_passages(const Ring<S>& ring, int split) {
    const int units = a.blocks * a.parts;
    const int begin = int(int64_t(units) * split / a.bank_splits);
    const int end = int(int64_t(units) * (split + 1) / a.bank_splits);
    for (int u = begin; u < end; ++u) {
      const int b = u / a.parts, slot = b * a.block + u % a.parts * a.unit_slots;
      const int slot_end = min(min(slot + a.unit_slots, ring.block_end(b)), ring.fill);
      const bool for_table = a.incremental && !ring.is_direct(b);
      unit = Lse<A>{};
      for (int s = slot; s < slot_end;) {
        const Run run = ring.run(s, slot_end);
        banked_run(run, a.passages, a.m, run.in_window && a.banked_columns, for_table);
        s = run.end;
      }
      if (!for_table || warp > last - first) continue;
      unit.merge_lanes(32);
      if (lane == 0) a.unit_lse[int64_t(u) * a.n + first + warp] = unit.value();
    }
  }

  __device__ void banked_queries(const Ring<S>& ring, int split) {
    const int end = int(int64_t(ring.fill) * (split + 1) / a.gradient_bank);
    for (int s = int(int64_t(ring.fill) * split / a.gradient_bank); s < end;) {
      const Run run = ring.run(s, end);
      if (run.in_window && a.banked_rows) banked_run(run, a.queries, 1, true, false);
      s = run.end;
    }
  }

  __device__ void store(int split) {
    const int64_t at = int64_t(split) * total + first;
    if (kQuerySide && warp <= last - first) {
      const A whole = warp_sum(sum);
      if (lane == 0) {
        a.part_max[at + warp] = top;
        a.part_sum[at + warp] = whole;
      }
    }
    if (!a.with_grad) return;
#pragma unroll
    for (int l = 0; l < L; ++l)
#pragma unroll
      for (int i = 0; i < DPT; ++i) {
        const int k = threadIdx.x + i * kThreads;
        if (k < a.d && l <= last - first) a.part_out[(at + l) * a.d + k] = acc[l][i];
      }
  }

 private:
  // Vectors [j, j + count) of a flat array with m vectors a slot.
  struct Tile {
    const S* vectors;
    int j, count, m;
    int mean;  // their row of means, or -1 without offsets
    bool local, in_loss, for_table;
  };

  __device__ void banked_run(const Run& run, const S* vectors, int m, bool in_loss,
                             bool for_table) {
    if (!in_loss && !for_table) return;
    // A tile holds whole slots where it can, so that kinds of passage repeat with period m.
    const int step = m <= kTile ? kTile / m * m : kTile, end = run.end * m;
    const int mean = a.use_offsets && in_loss ? run.mean : -1;
    for (int j = run.begin * m; j < end; j += step)
      tile({vectors, j, min(step, end - j), m, mean, false, in_loss, for_table});
  }

  __device__ int kind(const Tile& t, int i) const { return kQuerySide ? 1 + (t.j + i) % t.m : 0; }

  __device__ void tile(const Tile& t) {
    A* weight = sh.weight[buffer];
    A* bias = sh.bias[buffer];
    A* mass = sh.mass[buffer];
    A* shrink = sh.shrink[buffer];
    const int kinds = t.mean < 0 ? 0 : min(t.m, t.count);

    A score = minus_infinity<A>();
    if (warp * T < t.count) {
      const S* row[T];
      rows_from(t.vectors, t.j + warp * T, t.j + t.count - 1, a.d, row);
      const A dot = warp_scores<V>(row, locals, first, last, a.d);
      const int i = warp * T + lane_row<A>(), l = first + lane_local<A>();
      if (i < t.count && l <= last && !(a.masked() && left_out(t, t.j + i, l)))
        score = dot * a.scale;
    }
    weight[warp * 32 + lane] = score;
    for (int i = warp; i < kinds; i += kWarps) {
      const A b =
          warp_bias(a.mean(0, kind(t, i)), a.mean(t.mean, kind(t, i)), locals, first, last, a.d) *
          a.scale;
      if (lane < L) bias[i * L + lane] = b;
    }
    __syncthreads();

    if (warp < L) {
      if constexpr (kQuerySide)
        soften(t, weight, bias, shrink, kinds);
      else
        weigh(t, weight, bias, kinds);
      __syncwarp();
      for (int i = lane; i < kinds; i += 32) {
        A total_mass = 0;
        for (int c = i; c < t.count; c += t.m) total_mass += weight[c * L + warp];
        mass[i * L + warp] = total_mass;
      }
    }
    __syncthreads();

    if (a.with_grad && t.in_loss) {
      if constexpr (kQuerySide) {
#pragma unroll
        for (int l = 0; l < L; ++l) {
          const A factor = shrink[l];
#pragma unroll
          for (int i = 0; i < DPT; ++i) acc[l][i] *= factor;
        }
      }
      const S* x = t.vectors + int64_t(t.j) * a.d;
#pragma unroll 2
      for (int c = 0; c < t.count; ++c) accumulate(x + int64_t(c) * a.d, weight + c * L);
      for (int i = 0; i < kinds; ++i)
        accumulate_offset(a.mean(0, kind(t, i)), a.mean(t.mean, kind(t, i)), mass + i * L);
    }
    buffer ^= 1;
  }

  // A false negative: the column holds the same passage as the row's positive. A row of the loss is
  // a local vector on the query side and a tile's vector on the passage side.
  __device__ bool left_out(const Tile& t, int j, int l) const {
    if constexpr (kQuerySide) {
      const int64_t positive = a.local_ids[int64_t(l) * a.m];
      const int64_t column = t.local ? a.local_ids[j] : a.ids[j];
      return positive != -1 && column == positive && !(t.local && j == l * a.m);
    } else {
      const int64_t positive = (t.local ? a.local_ids : a.ids)[int64_t(j) * a.m];
      return positive != -1 && a.local_ids[l] == positive && !(t.local && l == j * a.m);
    }
  }

  // Warp l: online softmax of local row l over the tile.
  __device__ void soften(const Tile& t, A* weight, const A* bias, A* shrink, int kinds) {
    A score[kTile / 32];
    A tile_top = minus_infinity<A>();
#pragma unroll
    for (int e = 0; e < kTile / 32; ++e) {
      const int c = lane + 32 * e;
      score[e] = weight[c * L + warp];
      if (t.for_table) unit.add_score(score[e]);
      if (kinds && c < t.count) score[e] += bias[c % t.m * L + warp];
      tile_top = score[e] > tile_top ? score[e] : tile_top;
    }
    if (!t.in_loss) return;
    tile_top = warp_max(tile_top);
    const A new_top = tile_top > top ? tile_top : top;
    const A factor = top == new_top ? A(1) : exp_(top - new_top);
    sum *= factor;
#pragma unroll
    for (int e = 0; e < kTile / 32; ++e) {
      // -inf minus -inf would be NaN; a pair left out has weight 0
      const A w = score[e] == minus_infinity<A>() ? A(0) : exp_(score[e] - new_top);
      sum += w;
      const int c = lane + 32 * e;  // the target is in the sum, not in the product: reduce.cuh
      weight[c * L + warp] = t.local && t.j + c == (first + warp) * a.m ? A(0) : w;
    }
    top = new_top;
    if (lane == 0) shrink[warp] = factor;
  }

  // Warp l: probabilities of local column l in the tile's rows.
  __device__ void weigh(const Tile& t, A* weight, const A* bias, int kinds) const {
    const A* lse = t.local ? a.local_lse : a.row_lse;
    for (int c = lane; c < t.count; c += 32) {
      const A s = weight[c * L + warp];
      const bool own = t.local && first + warp == (t.j + c) * a.m;  // see soften()
      weight[c * L + warp] = own ? A(0) : exp_(s + (kinds ? bias[warp] : A(0)) - lse[t.j + c]);
    }
  }

  __device__ __forceinline__ void accumulate(const S* x, const A* weight) {
    A w[L];
#pragma unroll
    for (int l = 0; l < L; ++l) w[l] = weight[l];
#pragma unroll
    for (int i = 0; i < DPT; ++i) {
      const int k = threadIdx.x + i * kThreads;
      const A value = k < a.d ? to_acc(x[k]) : A(0);
#pragma unroll
      for (int l = 0; l < L; ++l) acc[l][i] += w[l] * value;
    }
  }
  __device__ __forceinline__ void accumulate_offset(const A* now, const A* then, const A* weight) {
#pragma unroll
    for (int i = 0; i < DPT; ++i) {
      const int k = threadIdx.x + i * kThreads;
      const A value = k < a.d ? now[k] - then[k] : A(0);
#pragma unroll
      for (int l = 0; l < L; ++l) acc[l][i] += weight[l] * value;
    }
  }

  const Args<S>& a;
  Shared& sh;
  const int total, first, last;  // local vectors: all, and those of this thread block
  const S* locals;
  const int warp, lane;
  int buffer = 0;
  A acc[L][DPT] = {};
  A top = minus_infinity<A>(), sum = 0;  // warp l: of local row l; sum still apart by lane
  Lse<A> unit;                           // warp l, by lane: without offsets, for the table
};

// Grid (local_splits + bank_splits, rows / kLocals).
template <class S, int DPT, int V>
__global__ void __launch_bounds__(kThreads) attend_queries(const Args<S> a) {
  using Side = Attend<S, true, DPT, V>;
  __shared__ typename Side::Shared shared;
  Side side(a, shared);
  const int split = blockIdx.x;
  if (split < a.local_splits)
    side.local_tiles(split, a.local_splits);
  else
    side.banked_passages(Ring<S>(a, a.cursor), split - a.local_splits);
  side.store(split);
}

// Grid (gradient_local + gradient_bank, columns / kLocals).
template <class S, int DPT, int V>
__global__ void __launch_bounds__(kThreads) attend_passages(const Args<S> a) {
  using Side = Attend<S, false, DPT, V>;
  __shared__ typename Side::Shared shared;
  Side side(a, shared);
  const int split = blockIdx.x;
  if (split < a.gradient_local)
    side.local_tiles(split, a.gradient_local);
  else
    side.banked_queries(Ring<S>(a, a.position), split - a.gradient_local);
  side.store(split);
}

}  // namespace contaccum
