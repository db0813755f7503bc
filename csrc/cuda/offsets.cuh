// Drift offsets for attend_sm90a.cuh: what the offset of a block of slots, mean_now - mean_then, adds
// to scores, and what the block's probability mass makes of it in the gradients. Both are products
// with (blocks, d): tiled like any, in float32.
#pragma once

#include "online_softmax.cuh"
#include "reduce.cuh"
#include "slot_walk.cuh"

namespace contaccum {

constexpr float kLog2eOfScores = 1.4426950408889634f;  // biases and query masses are in base 2

// --- biases -----------------------------------------------------------------------------------------

constexpr int kBiasMeans = 16, kBiasLocals = 64, kBiasDepth = 32;

inline int64_t bias_blocks(int64_t means, int64_t locals) {
  return ceil_div(means, kBiasMeans) * ceil_div(locals, kBiasLocals);
}

// One (kBiasMeans, kBiasLocals) tile of out (means, locals); the i-th mean is means[1 + i / kinds],
// of kind first_kind + i % kinds.
template <class S>
__device__ void bias_tile(const Args<S>& a, int tile, const S* locals, int local_count, int kinds,
                          int first_kind, float* out) {
  __shared__ float offset[kBiasDepth][kBiasMeans + 1], local[kBiasDepth][kBiasLocals + 1];
  const int count = (1 + a.offset_blocks) * kinds;
  const int tiles = (local_count + kBiasLocals - 1) / kBiasLocals;
  const int mean0 = tile / tiles * kBiasMeans, local0 = tile % tiles * kBiasLocals;
  const int my_mean = threadIdx.x / 16, my_local = threadIdx.x % 16;
  float sum[4] = {};
  for (int k0 = 0; k0 < a.d; k0 += kBiasDepth) {
    const int k = threadIdx.x % kBiasDepth, row = threadIdx.x / kBiasDepth;
    constexpr int kRows = kThreads / kBiasDepth;
    for (int r = row; r < kBiasMeans; r += kRows) {
      const int i = min(mean0 + r, count - 1), kind = first_kind + i % kinds;
      offset[k][r] = k0 + k < a.d
                         ? float(a.mean(0, kind)[k0 + k] - a.mean(1 + i / kinds, kind)[k0 + k])
                         : 0.f;
    }
    for (int r = row; r < kBiasLocals; r += kRows) {
      const int l = min(local0 + r, local_count - 1);
      local[k][r] = k0 + k < a.d ? float(to_acc(locals[int64_t(l) * a.d + k0 + k])) : 0.f;
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < kBiasDepth; ++x)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += offset[x][my_mean] * local[x][my_local + 16 * e];
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int i = mean0 + my_mean, l = local0 + my_local + 16 * e;
    if (i < count && l < local_count)
      out[int64_t(i) * local_count + l] = sum[e] * float(a.scale) * kLog2eOfScores;
  }
}

// Grid: the tiles of query_bias, then those of passage_bias.
template <class S>
__global__ void __launch_bounds__(kThreads) offset_biases(const Args<S> a) {
  const int query_tiles = ((1 + a.offset_blocks) * a.m + kBiasMeans - 1) / kBiasMeans *
                          ((a.n + kBiasLocals - 1) / kBiasLocals);
  int tile = blockIdx.x;
  if (tile < query_tiles) return bias_tile(a, tile, a.local_queries, a.n, int(a.m), 1, a.query_bias);
  tile -= query_tiles;
  bias_tile(a, tile, a.local_passages, a.n * a.m, 1, 0, a.passage_bias);
}

// --- gradients --------------------------------------------------------------------------------------

constexpr int kMassLocals = 32, kMassColumns = 64, kMassGroups = 32;

// Grid (d / kMassColumns, locals / kMassLocals, kOffsetSplits): a share of the slot groups each, into
// part_out behind the splits of the pass that has left the masses.
template <class S, bool kQuerySide>
__global__ void __launch_bounds__(kThreads) offset_gradients(const Args<S> a, int splits) {
  __shared__ float mass[kMassGroups][kMassLocals + 1], offset[kMassGroups][kMassColumns];
  __shared__ float lse[kMassLocals];
  const Ring<S> ring(a, kQuerySide ? a.cursor : a.position);
  const int total = kQuerySide ? a.n : a.n * a.m, kinds = kQuerySide ? int(a.m) : 1;
  const int local0 = blockIdx.y * kMassLocals, k0 = blockIdx.x * kMassColumns;
  if (kQuerySide && threadIdx.x < kMassLocals) {
    Lse<float> whole;
    const int l = min(local0 + int(threadIdx.x), total - 1);
    for (int s = 0; s < splits; ++s)
      whole.add(a.part_max[int64_t(s) * a.n + l], a.part_sum[int64_t(s) * a.n + l]);
    lse[threadIdx.x] = whole.value() * kLog2eOfScores;
  }
  __syncthreads();
  const int groups = (int(a.capacity) + kBoxRows - 1) / kBoxRows, pieces = (groups + 1) * kinds;
  const int begin = int(int64_t(pieces) * blockIdx.z / gridDim.z);
  const int end = int(int64_t(pieces) * (blockIdx.z + 1) / gridDim.z);
  const int my_column = threadIdx.x % kMassColumns, my_local = threadIdx.x / kMassColumns;
  constexpr int kEach = kMassLocals / (kThreads / kMassColumns);
  float sum[kEach] = {};
  for (int p0 = begin; p0 < end; p0 += kMassGroups) {
    const int count = min(kMassGroups, end - p0);
    for (int p = threadIdx.x / 32; p < count; p += kWarps) {
      const int group = (p0 + p) / kinds, kind = (p0 + p) % kinds, lane = threadIdx.x % 32;
      // The group's slots of one mean: up to head, or for the spare piece from head on.
      const bool spare = group == groups;
      const int slot = spare ? ring.head : group * kBoxRows;
      const int limit = min((slot / kBoxRows + 1) * kBoxRows, ring.fill);
      bool used = slot < limit && !(spare && ring.head % kBoxRows == 0);
      Run run{};
      if (used) {
        run = ring.run(slot, limit);
        used = run.in_window && (kQuerySide ? a.banked_columns : a.banked_rows);
      }
      const int l = min(local0 + lane, total - 1);
      float w = 0;
      if (used) {
        w = (kQuerySide ? a.query_mass : a.passage_mass)[int64_t(p0 + p) * total + l];
        if (kQuerySide) w = exp2f(w - lse[lane]);
      }
      mass[p][lane] = w;
      for (int k = lane; k < kMassColumns; k += 32) {
        const int which = kQuerySide ? 1 + kind : 0;
        offset[p][k] = used && k0 + k < a.d
                           ? float(a.mean(0, which)[k0 + k] - a.mean(run.mean, which)[k0 + k])
                           : 0.f;
      }
    }
    __syncthreads();
    for (int p = 0; p < count; ++p) {
      const float x = offset[p][my_column];
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum[e] += mass[p][my_local * kEach + e] * x;
    }
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int l = local0 + my_local * kEach + e, k = k0 + my_column;
    if (l < total && k < a.d)
      a.part_out[(int64_t(splits + blockIdx.z) * total + l) * a.d + k] = sum[e];
  }
}

}  // namespace contaccum
