// Drift offsets for the kernels of sm_90a, before they run: what the offset of a block of slots,
// mean_now - mean_then, adds to scores, and the offset itself as an operand of products.
//
// - Biases are a small product with (blocks, d). Tensor cores take numbers of 16 bits, so an offset
//   goes in as two: what rounding leaves of the first is the second. Biases are in base 2.
// - In gradients an offset is one more vector, its weight the mass of its slots: rounded as weights
//   are, and to bf16 whatever the bank is, since sums of weights exceed what a half can hold.
#pragma once

#include "ptx_mma.cuh"
#include "ptx_succession.cuh"
#include "ring.cuh"

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

constexpr int kOffsetWarps = 16, kOffsetThreads = 32 * kOffsetWarps;
// Of a thread block, which is all latency: a row for each warp to fetch, d shared by all of them.
constexpr int kBiasMeans = kOffsetWarps, kBiasLocals = kOffsetWarps;
constexpr int kBiasStride = 1024 + 8;  // an odd number of 16-byte units

// 16-bit elements, and where they end the sums of the warps.
struct OffsetsShared {
  union {
    struct {
      uint16_t offset[kBiasMeans][kBiasStride], rest[kBiasMeans][kBiasStride];
      uint16_t local[kBiasLocals][kBiasStride];
    };
    float part[kOffsetWarps][kBiasMeans][kBiasLocals + 1];
  };
};
constexpr int kOffsetBytesShared = sizeof(OffsetsShared);

__host__ __device__ inline int64_t bias_tiles(int64_t means, int64_t locals) {
  return (means + kBiasMeans - 1) / kBiasMeans * (padded_locals(locals) / kBiasLocals);
}

// One (kBiasMeans, kBiasLocals) tile of the biases (means, locals padded) of one side. The i-th
// mean is means[1 + i / kinds], of kind first_kind + i % kinds.
template <class S>
class BiasTile {
 public:
  __device__ BiasTile(const Args<S>& args, OffsetsShared& shared, bool query_side, int tile)
      : a(args),
        sh(shared),
        locals(query_side ? args.local_queries : args.local_passages),
        local_count(query_side ? args.n : args.n * args.m),
        kinds(query_side ? int(args.m) : 1),
        first_kind(query_side ? 1 : 0),
        count((1 + args.offset_blocks) * kinds),
        tiles(int(padded_locals(local_count)) / kBiasLocals),
        mean0(tile / tiles * kBiasMeans),
        local0(tile % tiles * kBiasLocals),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        // The first tile of a mean also rounds it.
        rounded(!args.with_grad || local0 > 0 ? nullptr
                : query_side                  ? args.passage_offsets
                                              : args.query_offsets),
        out(query_side ? args.query_bias : args.passage_bias) {}

  __device__ void run() {
    stage_local();
    stage_offset();
    copy_wait<0>();
    __syncthreads();
    float acc[2][4] = {};
    for (int k = warp * 16; k < a.d; k += kOffsetWarps * 16) {  // zeros behind d
      uint32_t offset[4], rest[4], x[4];
      const int row = lane % 16, column = k + lane / 16 * 8;
      load_matrices(offset, shared_address(&sh.offset[row][column]));
      load_matrices(rest, shared_address(&sh.rest[row][column]));
      load_matrices(x, shared_address(&sh.local[lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]));
#pragma unroll
      for (int nt = 0; nt < 2; ++nt) {
        multiply_add<S>(acc[nt], offset, x[2 * nt], x[2 * nt + 1]);
        multiply_add<S>(acc[nt], rest, x[2 * nt], x[2 * nt + 1]);
      }
    }
    __syncthreads();  // vectors are no longer read
#pragma unroll
    for (int nt = 0; nt < 2; ++nt)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sh.part[warp][lane / 4 + e / 2 * 8][nt * 8 + lane % 4 * 2 + e % 2] = acc[nt][e];
    __syncthreads();
    const int i = threadIdx.x / kBiasLocals, l = threadIdx.x % kBiasLocals;
    if (i >= kBiasMeans || mean0 + i >= count) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kOffsetWarps; ++w) sum += sh.part[w][i][l];
    out[(mean0 + i) * padded_locals(local_count) + local0 + l] =
        local0 + l < local_count ? sum * a.scale * kLog2e : 0.f;
  }

 private:
  // A warp's local vector and its offset, zero behind d up to a multiple of 16.
  __device__ void stage_local() {
    const bool valid = local0 + warp < local_count;
    const S* from = locals + int64_t(valid ? local0 + warp : 0) * a.d;
#pragma unroll 4
    for (int k = lane * 8; k < (a.d + 15) / 16 * 16; k += 32 * 8)
      copy_16(shared_address(&sh.local[warp][k]), from + (k < a.d ? k : 0), valid && k < a.d);
    copy_commit();
  }
  __device__ void stage_offset() {
    const int i = mean0 + warp, mean = min(i, count - 1), kind = first_kind + mean % kinds;
    const float *now = a.mean(0, kind), *then = a.mean(1 + mean / kinds, kind);
#pragma unroll 8  // loads in flight
    for (int k = lane * 4; k < (a.d + 15) / 16 * 16; k += 32 * 4) {
      const float4 x = *reinterpret_cast<const float4*>(now + min(k, a.d - 4));
      const float4 y = *reinterpret_cast<const float4*>(then + min(k, a.d - 4));
      const bool valid = i < count && k < a.d;
      const float offset[4] = {valid ? x.x - y.x : 0, valid ? x.y - y.y : 0, valid ? x.z - y.z : 0,
                               valid ? x.w - y.w : 0};
      uint2 first, rest;
      split_pair<S>(offset[0], offset[1], first.x, rest.x);
      split_pair<S>(offset[2], offset[3], first.y, rest.y);
      *reinterpret_cast<uint2*>(&sh.offset[warp][k]) = first;
      *reinterpret_cast<uint2*>(&sh.rest[warp][k]) = rest;
      if (rounded == nullptr || !valid) continue;
      Pack<Bf16, 4> whole;
#pragma unroll
      for (int e = 0; e < 4; ++e) whole.x[e] = __float2bfloat16(offset[e]);
      *reinterpret_cast<Pack<Bf16, 4>*>(rounded + int64_t(i) * a.d + k) = whole;
    }
  }

  const Args<S>& a;
  OffsetsShared& sh;
  const S* const locals;
  const int local_count, kinds, first_kind, count, tiles, mean0, local0, warp, lane;
  Bf16* const rounded;
  float* const out;
};

// Grid: the tiles of query_bias, then those of passage_bias; none of one that has no array. Also
// clears the flags of the streaming kernels, which saves a launch.
template <class S>
__global__ void __launch_bounds__(kOffsetThreads) prepare_offsets(const Args<S> a, int flags) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // only launched on sm_90
  let_successor_start();                             // the query side: see attend_sm90a.cuh
  extern __shared__ __align__(16) char dynamic[];
  auto& shared = *reinterpret_cast<OffsetsShared*>(dynamic);
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < flags; i += kOffsetThreads) a.query_done[i] = 0;
  const int query_tiles =
      a.query_bias != nullptr ? int(bias_tiles((1 + a.offset_blocks) * a.m, a.n)) : 0;
  const int tile = blockIdx.x;
  if (tile < query_tiles)
    BiasTile<S>(a, shared, true, tile).run();
  else
    BiasTile<S>(a, shared, false, tile - query_tiles).run();
#endif
}

}  // namespace contaccum
