// Drift offsets for the kernels of sm_90a: what the offset of a block of slots, mean_now -
// mean_then, adds to scores, and what the block's probability mass makes of it in the gradients.
// Both are small products with (blocks, d). Tensor cores take numbers of 16 bits, so a float goes
// in as two: what rounding leaves of the first is the second. Biases and query masses are in
// base 2.
#pragma once

#include "online_softmax.cuh"
#include "ptx_mma.cuh"
#include "slot_walk.cuh"

namespace contaccum {

// Two neighbouring elements of an operand: rounded, and the rest.
template <class S>
__device__ __forceinline__ void split_pair(float x, float y, uint32_t& rounded, uint32_t& rest) {
  if constexpr (std::is_same_v<S, Bf16>) {
    const __nv_bfloat162 r = __floats2bfloat162_rn(x, y);
    const __nv_bfloat162 l = __floats2bfloat162_rn(x - __low2float(r), y - __high2float(r));
    rounded = reinterpret_cast<const uint32_t&>(r);
    rest = reinterpret_cast<const uint32_t&>(l);
  } else {
    const __half2 r = __floats2half2_rn(x, y);
    const __half2 l = __floats2half2_rn(x - __low2float(r), y - __high2float(r));
    rounded = reinterpret_cast<const uint32_t&>(r);
    rest = reinterpret_cast<const uint32_t&>(l);
  }
}

// --- biases ---

constexpr int kOffsetWarps = 16, kOffsetThreads = 32 * kOffsetWarps;  // latency decides
constexpr int kBiasMeans = 16, kBiasLocals = 32;

inline int64_t bias_tiles(int64_t means, int64_t locals) {
  return (means + kBiasMeans - 1) / kBiasMeans * ((locals + kBiasLocals - 1) / kBiasLocals);
}

// One (kBiasMeans, kBiasLocals) tile of out (means, locals); the i-th mean is means[1 + i / kinds],
// of kind first_kind + i % kinds. Warps share d.
template <class S>
__device__ void bias_tile(const Args<S>& a, int tile, const S* locals, int local_count, int kinds,
                          int first_kind, float* out) {
  constexpr int NT = kBiasLocals / 8;
  __shared__ float part[kOffsetWarps][kBiasMeans][kBiasLocals + 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = (1 + a.offset_blocks) * kinds;
  const int tiles = (local_count + kBiasLocals - 1) / kBiasLocals;
  const int mean0 = tile / tiles * kBiasMeans, local0 = tile % tiles * kBiasLocals;
  const float *now[2], *then[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = min(mean0 + lane / 4 + 8 * h, count - 1), kind = first_kind + i % kinds;
    now[h] = a.mean(0, kind);
    then[h] = a.mean(1 + i / kinds, kind);
  }
  float acc[NT][4] = {};
  for (int k0 = warp * 16; k0 < a.d; k0 += kOffsetWarps * 16) {
    uint32_t x[4], rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {  // rows lane / 4 and 8 further; then the same, 8 elements further
      const int k = k0 + e / 2 * 8 + lane % 4 * 2;
      float2 offset = {0, 0};
      if (k < a.d) {
        const float2 y = *reinterpret_cast<const float2*>(now[e % 2] + k);
        const float2 z = *reinterpret_cast<const float2*>(then[e % 2] + k);
        offset = {y.x - z.x, y.y - z.y};
      }
      split_pair<S>(offset.x, offset.y, x[e], rest[e]);
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const S* local = locals + int64_t(min(local0 + nt * 8 + lane / 4, local_count - 1)) * a.d;
      uint32_t y[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = k0 + half * 8 + lane % 4 * 2;
        y[half] = k < a.d ? *reinterpret_cast<const uint32_t*>(local + k) : 0u;
      }
      multiply_add<S>(acc[nt], x, y[0], y[1]);
      multiply_add<S>(acc[nt], rest, y[0], y[1]);
    }
  }
#pragma unroll
  for (int nt = 0; nt < NT; ++nt)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      part[warp][lane / 4 + e / 2 * 8][nt * 8 + lane % 4 * 2 + e % 2] = acc[nt][e];
  __syncthreads();
  for (int at = threadIdx.x; at < kBiasMeans * kBiasLocals; at += kOffsetThreads) {
    const int i = at / kBiasLocals, l = at % kBiasLocals;
    float sum = 0;
    for (int w = 0; w < kOffsetWarps; ++w) sum += part[w][i][l];
    if (mean0 + i < count && local0 + l < local_count)
      out[int64_t(mean0 + i) * local_count + local0 + l] = sum * a.scale * kLog2e;
  }
}

// Grid: the tiles of query_bias, then those of passage_bias.
template <class S>
__global__ void __launch_bounds__(kOffsetThreads) offset_biases(const Args<S> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // only launched on sm_90
  const int means = 1 + a.offset_blocks;
  const int query_tiles =
      (means * a.m + kBiasMeans - 1) / kBiasMeans * ((a.n + kBiasLocals - 1) / kBiasLocals);
  const int tile = blockIdx.x;
  if (tile < query_tiles)
    bias_tile(a, tile, a.local_queries, a.n, int(a.m), 1, a.query_bias);
  else
    bias_tile(a, tile - query_tiles, a.local_passages, a.n * a.m, 1, 0, a.passage_bias);
#endif
}

// --- gradients ---

constexpr int kMassLocals = 32, kMassColumns = 64;

// Grid (d / kMassColumns, locals / kMassLocals, kOffsetSplits): a share of the slot groups each,
// into part_out behind the splits of the pass that has left the masses. A warp has 16 elements of d
// and a quarter of the share.
template <class S, bool kQuerySide>
__global__ void __launch_bounds__(kOffsetThreads) offset_gradients(const Args<S> a, int splits) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // only launched on sm_90
  constexpr int NT = kMassLocals / 8, kDown = kMassColumns / 16, kAlong = kOffsetWarps / kDown;
  __shared__ float part[kMassLocals][kMassColumns + 1];
  __shared__ float lse[kMassLocals];
  const Ring<S> ring(a, kQuerySide ? a.cursor : a.position);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int total = kQuerySide ? a.n : a.n * a.m, kinds = kQuerySide ? int(a.m) : 1;
  const int local0 = blockIdx.y * kMassLocals;
  const int column = blockIdx.x * kMassColumns + warp % kDown * 16 + lane / 4;  // and 8 further
  if (kQuerySide) {  // 16 lanes a local vector
    constexpr int kLanes = kOffsetThreads / kMassLocals;
    const int l = threadIdx.x / kLanes, row = min(local0 + l, total - 1);
    Lse<float> whole;
    for (int s = threadIdx.x % kLanes; s < splits; s += kLanes)
      whole.add(a.part_max[int64_t(s) * a.n + row], a.part_sum[int64_t(s) * a.n + row]);
    whole.merge_lanes(kLanes);
    if (threadIdx.x % kLanes == 0) lse[l] = whole.value() * kLog2e;
  }
  __syncthreads();
  const int groups = (int(a.capacity) + kBoxRows - 1) / kBoxRows, pieces = (groups + 1) * kinds;
  const int share = int(blockIdx.z) * kAlong + warp / kDown, shares = int(gridDim.z) * kAlong;
  const int steps = (pieces + 15) / 16;
  float acc[NT][4] = {};
  for (int p0 = steps * share / shares * 16; p0 < steps * (share + 1) / shares * 16; p0 += 16) {
    float offset[2][4], mass[NT][4];  // by elements of d; of pieces 2 (lane % 4) + {0, 1, 8, 9}
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int p = p0 + lane % 4 * 2 + e % 2 + e / 2 * 8, kind = p % kinds;
      // The piece's slots: up to head, or for the spare piece from head on.
      const bool spare = p / kinds == groups;
      const int slot = spare ? ring.head : p / kinds * kBoxRows;
      const int limit = min((slot / kBoxRows + 1) * kBoxRows, ring.fill);
      bool used = p < pieces && slot < limit && !(spare && ring.head % kBoxRows == 0);
      Run run{};
      if (used) {
        run = ring.run(slot, limit);
        used = run.in_window && (kQuerySide ? a.banked_columns : a.banked_rows);
      }
      const int which = kQuerySide ? 1 + kind : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = column + 8 * h;
        offset[h][e] = used && k < a.d ? a.mean(0, which)[k] - a.mean(run.mean, which)[k] : 0.f;
      }
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int l = nt * 8 + lane / 4;
        float w = 0;
        if (used && local0 + l < total) {
          w = (kQuerySide ? a.query_mass : a.passage_mass)[int64_t(p) * total + local0 + l];
          if (kQuerySide) w = exp2_(w - lse[l]);
        }
        mass[nt][e] = w;
      }
    }
    uint32_t x[4], x_rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      split_pair<Bf16>(offset[e % 2][e / 2 * 2], offset[e % 2][e / 2 * 2 + 1], x[e], x_rest[e]);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      uint32_t y[2], y_rest[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        split_pair<Bf16>(mass[nt][2 * half], mass[nt][2 * half + 1], y[half], y_rest[half]);
      multiply_add<Bf16>(acc[nt], x, y[0], y[1]);
      multiply_add<Bf16>(acc[nt], x_rest, y[0], y[1]);
      multiply_add<Bf16>(acc[nt], x, y_rest[0], y_rest[1]);
    }
  }
  // acc: (d, local). The parts of the share are added in order.
  for (int turn = 0; turn < kAlong; ++turn) {
    if (warp / kDown == turn)
#pragma unroll
      for (int nt = 0; nt < NT; ++nt)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum =
              part[nt * 8 + lane % 4 * 2 + e % 2][warp % kDown * 16 + lane / 4 + e / 2 * 8];
          sum = turn == 0 ? acc[nt][e] : sum + acc[nt][e];
        }
    __syncthreads();
  }
  for (int at = threadIdx.x; at < kMassLocals * kMassColumns; at += kOffsetThreads) {
    const int l = local0 + at / kMassColumns, k = blockIdx.x * kMassColumns + at % kMassColumns;
    if (l < total && k < a.d)
      a.part_out[(int64_t(splits + blockIdx.z) * total + l) * a.d + k] =
          part[at / kMassColumns][at % kMassColumns];
  }
#endif
}

}  // namespace contaccum
