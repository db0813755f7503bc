// Drift offsets for the kernels of sm_90a, before they run: what the offset of a block of slots,
// mean_now - mean_then, adds to scores, and the offset itself as an operand of products.
//
// - Biases are a small product with (blocks, d), staged by slices of d. Tensor cores take numbers
// of
//   16 bits, so an offset goes in as two: what rounding leaves of the first is the second. Biases
//   are in base 2.
// - In gradients an offset is one more vector, its weight the mass of its slots: rounded as weights
//   are, and to bf16 whatever the bank is, since sums of weights exceed what a half can hold.
#pragma once

#include "ptx_mma.cuh"
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
constexpr int kBiasMeans = 32, kBiasLocals = 64;
constexpr int kBiasSlice = 384;              // elements of d at once: two thread blocks a processor
constexpr int kBiasStride = kBiasSlice + 8;  // an odd number of 16-byte units
constexpr int kBiasDeep = kOffsetWarps / 4;  // warps that share d; the others 16 means, 32 locals
constexpr int kPartStride = kBiasLocals + 1;

// 16-bit elements, and where they end the sums of the warps.
struct OffsetsShared {
  union {
    struct {
      uint16_t offset[kBiasMeans][kBiasStride], rest[kBiasMeans][kBiasStride];
      uint16_t local[kBiasLocals][kBiasStride];
    };
    float part[kBiasDeep][kBiasMeans][kPartStride];
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
        // The first tile of a mean also rounds it.
        rounded(!args.with_grad || local0 > 0 ? nullptr
                : query_side                  ? args.passage_offsets
                                              : args.query_offsets),
        out(query_side ? args.query_bias : args.passage_bias) {}

  __device__ void run() {
    constexpr int NT = 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int down = warp % 2 * 16, across = warp / 2 % 2 * 32, deep = warp / 4;
    float acc[NT][4] = {};
    for (int k0 = 0; k0 < a.d; k0 += kBiasSlice) {
      if (k0 > 0) __syncthreads();
      stage(k0);
      __syncthreads();
#pragma unroll
      for (int k = deep * 16; k < kBiasSlice; k += kBiasDeep * 16) {
        if (k0 + k >= a.d) continue;  // behind the last element all is zero up to 16
        uint32_t offset[4], rest[4], x[NT / 2][4];
        const int row = down + lane % 16, column = k + lane / 16 * 8;
        load_matrices(offset, shared_address(&sh.offset[row][column]));
        load_matrices(rest, shared_address(&sh.rest[row][column]));
#pragma unroll
        for (int nt = 0; nt < NT / 2; ++nt)
          load_matrices(
              x[nt],
              shared_address(
                  &sh.local[across + nt * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]));
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint32_t (&y)[4] = x[nt / 2];
          multiply_add<S>(acc[nt], offset, y[nt % 2 * 2], y[nt % 2 * 2 + 1]);
          multiply_add<S>(acc[nt], rest, y[nt % 2 * 2], y[nt % 2 * 2 + 1]);
        }
      }
    }
    __syncthreads();  // slices are no longer read
#pragma unroll
    for (int nt = 0; nt < NT; ++nt)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sh.part[deep][down + lane / 4 + e / 2 * 8][across + nt * 8 + lane % 4 * 2 + e % 2] =
            acc[nt][e];
    __syncthreads();
    for (int at = threadIdx.x; at < kBiasMeans * kBiasLocals; at += kOffsetThreads) {
      const int i = at / kBiasLocals, l = at % kBiasLocals;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kBiasDeep; ++w) sum += sh.part[w][i][l];
      if (mean0 + i < count)
        out[(mean0 + i) * padded_locals(local_count) + local0 + l] =
            local0 + l < local_count ? sum * a.scale * kLog2e : 0.f;
    }
  }

 private:
  // Elements k0 up to k0 + kBiasSlice of the tile's offsets and local vectors; zero behind d.
  __device__ void stage(int k0) {
    constexpr int kUnits = kBiasSlice / 8;  // of 8 elements
#pragma unroll
    for (int u = threadIdx.x; u < kBiasLocals * kUnits; u += kOffsetThreads) {
      const int l = u / kUnits, k = u % kUnits * 8;
      const bool valid = local0 + l < local_count && k0 + k < a.d;
      const int64_t from = int64_t(valid ? local0 + l : 0) * a.d + (valid ? k0 + k : 0);
      copy_16(shared_address(&sh.local[l][k]), locals + from, valid);
    }
    copy_commit();
    constexpr int kQuads = kBiasSlice / 4, kEach = kBiasMeans * kQuads / kOffsetThreads;
    static_assert(kBiasMeans * kQuads % kOffsetThreads == 0, "the same number for each thread");
    float4 now[kEach], then[kEach];
#pragma unroll
    for (int x = 0; x < kEach; ++x) {  // loads in flight
      const int u = threadIdx.x + x * kOffsetThreads, k = min(k0 + u % kQuads * 4, a.d - 4);
      const int i = min(mean0 + u / kQuads, count - 1), kind = first_kind + i % kinds;
      now[x] = *reinterpret_cast<const float4*>(a.mean(0, kind) + k);
      then[x] = *reinterpret_cast<const float4*>(a.mean(1 + i / kinds, kind) + k);
    }
#pragma unroll
    for (int x = 0; x < kEach; ++x) {
      const int u = threadIdx.x + x * kOffsetThreads, i = u / kQuads, k = u % kQuads * 4;
      const bool valid = mean0 + i < count && k0 + k < a.d;
      const float offset[4] = {valid ? now[x].x - then[x].x : 0, valid ? now[x].y - then[x].y : 0,
                               valid ? now[x].z - then[x].z : 0, valid ? now[x].w - then[x].w : 0};
      uint2 first, rest;
      split_pair<S>(offset[0], offset[1], first.x, rest.x);
      split_pair<S>(offset[2], offset[3], first.y, rest.y);
      *reinterpret_cast<uint2*>(&sh.offset[i][k]) = first;
      *reinterpret_cast<uint2*>(&sh.rest[i][k]) = rest;
      if (rounded == nullptr || !valid) continue;
      Pack<Bf16, 4> whole;
#pragma unroll
      for (int e = 0; e < 4; ++e) whole.x[e] = __float2bfloat16(offset[e]);
      *reinterpret_cast<Pack<Bf16, 4>*>(rounded + int64_t(mean0 + i) * a.d + k0 + k) = whole;
    }
    copy_wait<0>();
  }

  const Args<S>& a;
  OffsetsShared& sh;
  const S* const locals;
  const int local_count, kinds, first_kind, count, tiles, mean0, local0;
  Bf16* const rounded;
  float* const out;
};

// Grid: the tiles of query_bias, then those of passage_bias; none of one that has no array.
template <class S>
__global__ void __launch_bounds__(kOffsetThreads) prepare_offsets(const Args<S> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // only launched on sm_90
  extern __shared__ __align__(16) char dynamic[];
  auto& shared = *reinterpret_cast<OffsetsShared*>(dynamic);
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
