// One side of the loss on Hopper's tensor cores, for 16-bit banks of d <= 1024; what attend.cuh
// computes, for batches of more than a few vectors.
//
// - A block holds 64 local vectors and walks over the bank in tiles of 64. Bank and weights come as
//   the operands of warpgroup products from shared memory; sums stay in registers.
// - 64 x d sums fill the registers at d = 384. For more, two blocks share the elements of d as a
//   cluster: each multiplies its half, they exchange partial scores, both weigh the whole tile.
// - One warp asks the copy engine for tiles, a warpgroup makes scores into weights
// (weigh_sm90a.cuh),
//   two sum up weighted tiles.
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
        rank(T::kCluster == 2 ? int(cluster_rank()) : 0),
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
        barrier_init(at(sh.empty[s]), 8);  // the warps that sum
      }
      for (int b = 0; b < 2; ++b) {
        barrier_init(at(sh.weights_full[b]), 16);  // four lanes of the warps that score
        barrier_init(at(sh.weights_empty[b]), 8);
      }
      barrier_init(at(sh.partial_full), 1);
      barrier_init(at(sh.partial_empty), 4);
      barrier_init_fence();
    }
    if (T::kCluster == 2)
      cluster_sync();
    else
      __syncthreads();
    // Not known to the compiler to be the same in a warp; products in a branch that might diverge
    // are serialised.
    const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / T::kGroup, 0);
    if (group == 0) {
      registers_up_to<T::kScoreRegisters>();
      WeighHopper<S, kSide, T>(a, ring, sh, rank).run();
    } else if (group < 3) {
      registers_up_to<T::kSumRegisters>();
      sum_up(group - 1);
    } else {
      registers_down_to<T::kCopyRegisters>();
      if (threadIdx.x == 3 * T::kGroup) copy();
    }
    __syncwarp();
    if (T::kCluster == 2) cluster_sync();  // neither block leaves while the other may write to it
  }

 private:
  // --- one thread: tiles from global memory ---

  __device__ __forceinline__ void copy_vectors(char* to, const CUtensorMap* map, int kind, int row,
                                               uint32_t barrier) {
    barrier_expect(barrier, T::kOperandBytes);
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c)
      copy_box(shared_address(to) + c * T::kBoxBytes, map, rank * T::kSlice + c * kBoxColumns, kind,
               row, barrier);
  }

  __device__ __forceinline__ void copy() {
    prefetch_map(&maps.bank);
    copy_vectors(sh.local, &maps.locals, 0, first, at(sh.locals_ready));
    SlotWalk<S, kQuerySide> walk(a, ring, split, splits);
    bool more = true;
    for (int i = 0; more; ++i) {
      more = walk.next();
      const int stage = i % T::kStages;
      if (i >= T::kStages) barrier_wait(at(sh.empty[stage]), (i / T::kStages - 1) & 1);
      SlotTile& t = sh.slots[stage];
      t = walk.tile;
      if (!more) t.count = 0;  // tells those who wait for a tile
      if (more)
        copy_vectors(sh.tile[stage], t.local ? &maps.local_vectors : &maps.bank, t.kind, t.slot,
                     at(sh.full[stage]));
      else
        barrier_arrive(at(sh.full[stage]));
    }
  }

  // --- two warpgroups: weighted sums, of half of the block's elements of d each ---

  __device__ __forceinline__ void sum_up(int which) {
    float acc[T::kSums][32];
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int x = 0; x < 32; ++x) acc[c][x] = 0;
    for (int i = 0;; ++i) {
      const int buffer = i % 2, stage = i % T::kStages;
      barrier_wait(at(sh.weights_full[buffer]), i / 2 & 1);
      const Order order = uniform(lane == 0 ? sh.order[buffer] : Order::skip);
      if (order == Order::stop) break;
      if (kQuerySide && order == Order::rescale_and_add) rescale(buffer, acc);
      if (order != Order::skip) {
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
    }
    if (a.with_grad) store(which, acc);
  }

  __device__ __forceinline__ static Order uniform(Order x) {
    return Order(__shfl_sync(0xffffffffu, int(x), 0));
  }
  __device__ __forceinline__ int my_row() const { return threadIdx.x / 32 % 4 * 16 + lane / 4; }
  __device__ __forceinline__ int my_local(int j) const { return 8 * j + lane % 4 * 2; }

  // The references have been raised.
  __device__ __forceinline__ void rescale(int buffer, float (&acc)[T::kSums][32]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
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
  const int rank, split, splits, total, first, lane;
};

// Grid (splits * kCluster, locals / 64), clusters of kCluster.
template <class S, Side kSide, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    attend_sm90a(const Args<S> a, const __grid_constant__ HopperMaps maps) {
  extern __shared__ __align__(1024) char dynamic[];
  const Ring<S> ring(a, kSide == Side::passages ? a.position : a.cursor);
  AttendHopper<S, kSide, T>(a, ring, maps, dynamic).run();
}

}  // namespace contaccum
