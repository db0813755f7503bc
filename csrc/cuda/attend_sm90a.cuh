// One side of the loss on Hopper's tensor cores, for 16-bit banks of d <= 768; what attend.cuh
// computes, for batches of more than a few vectors.
//
// - A block holds 64 local vectors and walks over the bank in tiles of 64. Bank and weights come as
//   the operands of warpgroup products from shared memory; sums stay in registers.
// - 64 x d sums fill the registers at d = 384. For more, two blocks share the elements of d as a
//   cluster: each multiplies its half, they exchange partial scores, both weigh the whole tile.
// - Two blocks with different locals share what they read of the bank, where there are that many.
// - One warp asks the copy engine for tiles, two warpgroups make scores into weights
//   (weigh_sm90a.cuh), two sum up weighted tiles.
#pragma once

#include "weigh_sm90a.cuh"

namespace contaccum {

template <class S, Side kSide, class T>
class AttendHopper {
  static constexpr bool kQuerySide = kSide != Side::passages;
  using Shared = HopperShared<T>;

 public:
  __device__ AttendHopper(const Args<S>& args, const Ring<S>& r, const HopperMaps& maps_, char* raw)
      : a(args),
        ring(r),
        maps(maps_),
        sh(*reinterpret_cast<Shared*>(raw)),
        rank(T::kCluster == 2 ? int(cluster_rank()) % 2 : 0),
        share(T::kShare == 2 ? int(cluster_rank()) / T::kCluster : 0),
        split(blockIdx.x / T::kCluster),
        splits(gridDim.x / T::kCluster),
        total(kQuerySide ? args.n : args.n * args.m),
        first(blockIdx.y * T::kLocal),
        lane(threadIdx.x % 32) {}

  __device__ void run() {
    if (threadIdx.x == 0) {
      barrier_init(at(sh.locals_ready), 1);
      for (int s = 0; s < T::kStages; ++s) {
        barrier_init(at(sh.full[s]), 1);
        barrier_init(at(sh.empty[s]), 8 * T::kShare);  // the warps that sum
      }
      for (int b = 0; b < 2; ++b) {
        barrier_init(at(sh.weights_full[b]), 8);  // the warps that score
        barrier_init(at(sh.weights_empty[b]), 8);
        barrier_init(at(sh.partial_full[b]), 1);
        barrier_init(at(sh.partial_empty[b]), 4);
      }
      barrier_init_fence();
    }
    if (T::kCluster * T::kShare > 1)
      cluster_sync();
    else
      __syncthreads();
    // Not known to the compiler to be the same in a warp; products in a branch that might diverge are
    // serialised.
    const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / T::kGroup, 0);
    if (group < 2) {
      registers_up_to<T::kScoreRegisters>();
      const int other = (rank ^ 1) + T::kCluster * share;  // with the other elements of d
      WeighHopper<S, kSide, T>(a, ring, sh, rank, other, group).run();
    } else if (group < 4) {
      registers_up_to<T::kSumRegisters>();
      sum_up(group - 2);
    } else {
      registers_down_to<T::kCopyRegisters>();
      if (threadIdx.x == 4 * T::kGroup) copy();
    }
    __syncwarp();
    if (T::kCluster * T::kShare > 1) cluster_sync();  // no block leaves while others may write to it
  }

 private:
  template <class V>
  __device__ __forceinline__ static uint32_t at(const V& variable) {
    return shared_address(&variable);
  }

  // --- one thread: tiles from global memory -------------------------------------------------------

  __device__ __forceinline__ void copy() {
    prefetch_map(&maps.bank);
    barrier_expect(at(sh.locals_ready), T::kOperandBytes);
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c)
      copy_box(shared_address(sh.local) + c * T::kBoxBytes, &maps.locals,
               rank * T::kSlice + c * kBoxColumns, 0, first, at(sh.locals_ready));
    SlotWalk<S, kQuerySide> walk(a, ring, split, splits);
    bool more = true;
    for (int i = 0; more; ++i) {
      more = walk.next();
      const int stage = i % T::kStages;
      if (i >= T::kStages) barrier_wait(at(sh.empty[stage]), (i / T::kStages - 1) & 1);
      SlotTile& t = sh.slots[stage];
      t = walk.tile;
      if (!more) t.count = 0;
      if (more)
        copy_tile(stage, t);
      else
        barrier_arrive(at(sh.full[stage]));
    }
  }

  // Blocks that share the bank fetch every other box for both.
  __device__ __forceinline__ void copy_tile(int stage, const SlotTile& t) {
    const CUtensorMap* map = t.local ? &maps.local_vectors : &maps.bank;
    const uint32_t full = at(sh.full[stage]), to = shared_address(sh.tile[stage]);
    barrier_expect(full, T::kOperandBytes);
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) {
      const int k = rank * T::kSlice + c * kBoxColumns;
      if constexpr (T::kShare == 1)
        copy_box(to + c * T::kBoxBytes, map, k, t.kind, t.slot, full);
      else if (c % 2 == share)
        copy_box_to(uint16_t((1 | 1 << T::kCluster) << rank), to + c * T::kBoxBytes, map, k, t.kind,
                    t.slot, full);
    }
  }

  // --- two warpgroups: weighted sums, of half of the block's elements of d each ----------------------

  __device__ __forceinline__ void sum_up(int which) {
    float acc[T::kSums][32];
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int x = 0; x < 32; ++x) acc[c][x] = 0;
    for (int i = 0;; ++i) {
      const int buffer = i % 2, stage = i % T::kStages;
      barrier_wait(at(sh.weights_full[buffer]), i / 2 & 1);
      const Order left = uniform(sh.order[buffer][0]);
      if (left == Order::stop) break;
      if (kQuerySide && left == Order::rescale_and_add) rescale<0>(buffer, acc);
      if (kQuerySide && uniform(sh.order[buffer][1]) == Order::rescale_and_add)
        rescale<1>(buffer, acc);
      if (left != Order::skip) {
        const uint64_t weights = matrix_at(shared_address(sh.weight[buffer]));
        const uint64_t tile =
            matrix_at(shared_address(sh.tile[stage]) + which * T::kSums * T::kBoxBytes);
#pragma unroll
        for (int c = 0; c < T::kSums; ++c) hold(acc[c]);
        products_begin();
#pragma unroll
        for (int k = 0; k < kBoxRows / 16; ++k)
#pragma unroll
          for (int c = 0; c < T::kSums; ++c) {
            const int rows = k * 16 * 128 >> 4;
            product<S, true>(acc[c], tile + (c * T::kBoxBytes >> 4) + rows, weights + rows, 1);
          }
        products_commit();
        products_wait<0>();
#pragma unroll
        for (int c = 0; c < T::kSums; ++c) hold(acc[c]);
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(at(sh.empty[stage]));
        barrier_arrive(at(sh.weights_empty[buffer]));
      }
      if (T::kShare == 2 && lane == 1)
        barrier_arrive_there(shared_of(at(sh.empty[stage]), rank + T::kCluster * (share ^ 1)));
    }
    if (a.with_grad) store(which, acc);
  }

  __device__ __forceinline__ static Order uniform(Order x) {
    return Order(__shfl_sync(0xffffffffu, int(x), 0));
  }
  __device__ __forceinline__ int my_row() const { return threadIdx.x / 32 % 4 * 16 + lane / 4; }
  __device__ __forceinline__ int my_local(int j) const { return 8 * j + lane % 4 * 2; }

  // The references of half of the local vectors have been raised.
  template <int half>
  __device__ __forceinline__ void rescale(int buffer, float (&acc)[T::kSums][32]) {
#pragma unroll
    for (int j = 4 * half; j < 4 * half + 4; ++j) {
      const float2 f = *reinterpret_cast<const float2*>(&sh.shrink[buffer][my_local(j)]);
#pragma unroll
      for (int c = 0; c < T::kSums; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          acc[c][4 * j + 2 * h] *= f.x;
          acc[c][4 * j + 2 * h + 1] *= f.y;
        }
    }
  }

  __device__ __forceinline__ void store(int which, const float (&acc)[T::kSums][32]) {
    const int64_t from = int64_t(split) * total + first;
    const float unshift = kQuerySide ? 1.f : exp2_(-weight_shift<S>(kSide));
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          const int k =
              rank * T::kSlice + (which * T::kSums + c) * kBoxColumns + my_row() + x / 2 * 8;
          const int l = my_local(j) + x % 2;
          if (k < a.d && first + l < total)
            a.part_out[(from + l) * a.d + k] = acc[c][4 * j + x] * unshift;
        }
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const HopperMaps& maps;
  Shared& sh;
  const int rank, share;  // which elements of d; which of the blocks that share the bank
  const int split, splits, total, first, lane;
};

// Grid (splits * kCluster, locals / 64), clusters of (kCluster, kShare).
template <class S, Side kSide, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    attend_sm90a(const Args<S> a, const __grid_constant__ HopperMaps maps) {
  extern __shared__ __align__(1024) char dynamic[];
  const Ring<S> ring(a, kSide == Side::passages ? a.position : a.cursor);
  AttendHopper<S, kSide, T>(a, ring, maps, dynamic).run();
}

}  // namespace contaccum
