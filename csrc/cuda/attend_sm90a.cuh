// One side of the loss on Hopper's tensor cores, for 16-bit banks of d <= 1024; what attend.cuh
// computes, for batches of more than a few vectors.
//
// - A block holds 64 local vectors and walks over the bank in tiles of 64. Bank and weights come as
//   the operands of warpgroup products from shared memory; sums stay in registers.
// - 64 x d sums fill the registers at d = 384. For more, two blocks share the elements of d as a
//   cluster: each multiplies its half, they exchange partial scores, both weigh the whole tile.
// - One warp asks the copy engine for tiles, a warpgroup makes scores into weights (that of
//   weigh_sm90a.cuh), two sum up weighted tiles.
// - Splits share a place in part_out: each waits for the one before it and adds to its sums.
// - The query side with offsets starts while prepare_offsets still runs, and waits where it needs
//   what that leaves.
#pragma once

#include "weigh_sm90a.cuh"

namespace contaccum {

template <class S, Side kSide, class T>
class AttendHopper {
  static constexpr bool kQuerySide = is_query_side(kSide);
  using Shared = HopperShared<T>;
  using Registers = HopperRegisters<T, kQuerySide, has_offsets(kSide)>;

 public:
  __device__ AttendHopper(const Args<S>& args, const Ring<S>& r, const HopperMaps& maps_, char* raw)
      : a(args),
        ring(r),
        maps(maps_),
        sh(*reinterpret_cast<Shared*>(raw)),
        rank(T::kCluster == 2 ? int(cluster_rank()) : 0),
        lane(threadIdx.x % 32) {}

  __device__ void run() {
    if (threadIdx.x == 0) {
      barrier_init(at(sh.locals_ready), 1);
      for (int s = 0; s < T::kStages; ++s) {
        barrier_init(at(sh.full[s]), 1);
        barrier_init(at(sh.empty[s]), 8);  // the warps that sum
      }
      for (int b = 0; b < 2; ++b) {
        barrier_init(at(sh.weights_full[b]), T::kGroup);  // the threads that score
        barrier_init(at(sh.weights_empty[b]), 2 * T::kGroup);
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
      registers_up_to<Registers::kScore>();
      WeighHopper<S, kSide, T>(a, ring, sh, rank).run();
    } else if (group < 3) {
      registers_up_to<Registers::kSum>();
      sum_up(group - 1);
    } else {
      registers_down_to<Registers::kCopy>();
      if (threadIdx.x == 3 * T::kGroup) copy();
    }
    __syncwarp();
    if (T::kCluster == 2)
      cluster_sync();  // neither block leaves while the other may write to it
    else
      __syncthreads();
    if (threadIdx.x == 0 && rank == 0 && leaves_sums()) raise_flag(flag(), in_place() + 1);
  }

 private:
  // Not kept in registers, which are scarce.
  __device__ __forceinline__ int split() const { return blockIdx.x / T::kCluster; }
  __device__ __forceinline__ int splits() const { return gridDim.x / T::kCluster; }
  __device__ __forceinline__ int total() const { return kQuerySide ? a.n : a.n * a.m; }
  __device__ __forceinline__ int first() const { return blockIdx.y * T::kLocal; }

  // --- one thread: tiles from global memory ---

  __device__ __forceinline__ void copy_vectors(char* to, const CUtensorMap* map, int kind, int row,
                                               uint32_t barrier) {
    barrier_expect(barrier, T::kOperandBytes);
#pragma unroll 1  // no registers for places of boxes
    for (int c = 0; c < T::kColumns; ++c)
      copy_box(shared_address(to) + c * T::kBoxBytes, map, rank * T::kSlice + c * kBoxColumns, kind,
               row, barrier);
  }

  __device__ __forceinline__ void copy() {
    prefetch_map(&maps.bank);
    copy_vectors(sh.local, &maps.locals, 0, first(), at(sh.locals_ready));
    SlotWalk<S, kQuerySide, has_offsets(kSide)> walk(a, ring, split(), splits());
    bool more = true;
    for (int i = 0; more; ++i) {
      more = walk.next();
      const int stage = i % T::kStages;
      if (i >= T::kStages) barrier_wait(at(sh.empty[stage]), (i / T::kStages - 1) & 1);
      SlotTile t = walk.tile();
      if (!more) t.count = 0;  // tells those who wait for a tile
      sh.slots[stage] = t;
      if (starts_early(kSide) && t.offsets) wait_for_predecessor();
      const CUtensorMap* map = t.offsets ? &maps.offsets
                               : t.local ? &maps.local_vectors
                                         : &maps.bank;
      if (more)
        copy_vectors(sh.tile[stage], map, t.kind, t.slot, at(sh.full[stage]));
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
      const Order order = Order(uniform(int(lane == 0 ? sh.order[buffer] : Order::skip)));
      if (order == Order::stop) break;
      if (kQuerySide && order == Order::rescale_and_add) rescale(buffer, acc);
      if (order != Order::skip) {
        const uint32_t weights = matrix_at(shared_address(sh.weight[buffer]));
        const uint32_t tile = matrix_at(
            shared_address(sh.tile[stage]) + which * T::kSums * T::kBoxBytes, T::kBoxBytes);
        if (has_offsets(kSide) && order == Order::add_offsets)
          add_tile<Bf16, kOffsetRows>(tile, weights, acc);
        else
          add_tile<S, kBoxRows>(tile, weights, acc);
      }
      // Products are all that most tiles have read by: a lane comes for its warp. Where every lane
      // has read itself, every lane comes: racecheck follows none that has not.
      __syncwarp();
      if (lane == 0) barrier_arrive(at(sh.empty[stage]));
      if (order == Order::rescale_and_add)
        barrier_arrive(at(sh.weights_empty[buffer]));
      else if (lane == 0)
        barrier_arrive<32>(at(sh.weights_empty[buffer]));
    }
    if (a.with_grad) store(which, acc);
  }

  // Boxes that a product sums: so wide that 128 registers, which the compiler counts with, hold it.
  static constexpr int kWide = T::kSums > 3 ? 2 : T::kSums;
  // The first kRows vectors of a tile: (local, bank) by (bank, d), as wide as there are sums, so
  // that weights are read once for all of them. With narrower products the tensor cores would read
  // as much as shared memory gives, and what blocks send each other would wait for them.
  template <class Operand, int kRows>
  __device__ __forceinline__ static void add_tile(uint32_t tile, uint32_t weights,
                                                  float (&acc)[T::kSums][32]) {
    hold(acc);
    products_begin();
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k)
#pragma unroll
      for (int c = 0; c < T::kSums; c += kWide) {
        const int rows = k * 16 * 128 >> 4;
        product<Operand, true>(reinterpret_cast<float (&)[kWide][32]>(acc[c]), weights + rows,
                               tile + (c * T::kBoxBytes >> 4) + rows, 1);
      }
    products_commit();
    products_wait<0>();
    hold(acc);
  }

  // acc[c][4 j + 2 h + e] is that of local vector my_local(h) and element 64 c + my_element(j) + e
  // of the warpgroup's.
  __device__ __forceinline__ static int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
  __device__ __forceinline__ int my_local(int h) const {
    return threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * h;
  }
  __device__ __forceinline__ int my_element(int j) const { return 8 * j + lane % 4 * 2; }

  // The references have been raised.
  __device__ __forceinline__ void rescale(int buffer, float (&acc)[T::kSums][32]) {
    const float f[2] = {sh.shrink[buffer][my_local(0)], sh.shrink[buffer][my_local(1)]};
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int x = 0; x < 32; ++x) acc[c][x] *= f[x / 2 % 2];
  }

  // --- where the sums go ---

  static constexpr int kQuads = T::kSums * 8;
  __device__ __forceinline__ int summing() const { return threadIdx.x - T::kGroup; }  // thread
  __device__ __forceinline__ int in_place() const { return split() & ((1 << a.sharing) - 1); }
  __device__ __forceinline__ bool leaves_sums() const {
    return a.with_grad && in_place() + 1 < 1 << a.sharing && split() + 1 < splits();
  }
  // A block's own 64 x kSlice numbers of part_out: see part_out_at().
  __device__ __forceinline__ int part() const {
    return ((split() >> a.sharing) * gridDim.y + blockIdx.y) * T::kCluster + rank;
  }
  __device__ __forceinline__ float* place() const {
    return a.part_out + int64_t(part()) * (T::kLocal * T::kSlice);
  }
  __device__ __forceinline__ int* flag() const {
    return (kQuerySide ? a.query_done : a.passage_done) + part() / T::kCluster;
  }

  // The last split of a place stores the sums of all by local vector; those before it leave them as
  // they lie in registers.
  __device__ __forceinline__ void store(int which, float (&acc)[T::kSums][32]) {
    if (in_place() > 0) {
      add_left_sums(acc);
      named_sync<2 * T::kGroup>(2);  // what was left has been read
    }
    if (leaves_sums()) {
      float4* const to = reinterpret_cast<float4*>(place()) + summing();
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const float* x = &acc[q / 8][q % 8 * 4];
        to[q * 2 * T::kGroup] = {x[0], x[1], x[2], x[3]};
      }
      return;
    }
    float* const to = place() + which * T::kSums * kBoxColumns;
    const float unshift = kQuerySide ? 1.f : exp2_(-weight_shift<S>(kSide));
#pragma unroll
    for (int c = 0; c < T::kSums; ++c)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          *reinterpret_cast<float2*>(to + my_local(h) * T::kSlice + c * kBoxColumns +
                                     my_element(j)) = {acc[c][4 * j + 2 * h] * unshift,
                                                       acc[c][4 * j + 2 * h + 1] * unshift};
  }
  // What the splits before this one have left, once they have.
  __device__ __forceinline__ void add_left_sums(float (&acc)[T::kSums][32]) {
    const int thread = summing();
    named_sync<2 * T::kGroup>(2);                     // tiles are no longer read
    if (starts_early(kSide)) wait_for_predecessor();  // it clears the flags
    if (lane == 0) wait_for_flag(flag(), in_place());
    __syncwarp();
    float4* const theirs = reinterpret_cast<float4*>(sh.tile) + thread;
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      copy_16(shared_address(theirs + q * 2 * T::kGroup),
              reinterpret_cast<const float4*>(place()) + q * 2 * T::kGroup + thread, true);
    copy_commit();
    if (kQuerySide && thread < T::kLocal) {
      const float2 f = factors(thread);
      sh.shrink[0][thread] = f.x;
      sh.shrink[1][thread] = f.y;
    }
    copy_wait<0>();
    if (kQuerySide) named_sync<2 * T::kGroup>(2);
    float mine[2] = {1, 1}, other[2] = {1, 1};
    if constexpr (kQuerySide) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mine[h] = sh.shrink[0][my_local(h)];
        other[h] = sh.shrink[1][my_local(h)];
      }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 x = load_in_order(shared_address(theirs + q * 2 * T::kGroup));
      float* const sum = &acc[q / 8][q % 8 * 4];
      sum[0] = sum[0] * mine[0] + x.x * other[0];
      sum[1] = sum[1] * mine[0] + x.y * other[0];
      sum[2] = sum[2] * mine[1] + x.z * other[1];
      sum[3] = sum[3] * mine[1] + x.w * other[1];
    }
  }
  // For this split's sums and for those that were left: see max_of_splits().
  __device__ __forceinline__ float2 factors(int l) const {
    if (first() + l >= total()) return {1, 1};
    const float mine = sh.reference[0][l] * kLn2;
    const float other = a.max_of_splits(split() - in_place(), split(), first() + l);
    const float top = fmaxf(fmaxf(mine, other), -1e30f);  // -inf minus -inf would be NaN
    return {exp2_((mine - top) * kLog2e), exp2_((other - top) * kLog2e)};
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const HopperMaps& maps;
  Shared& sh;
  const int rank, lane;
};

// Grid (splits * kCluster, locals / 64), clusters of kCluster.
template <class S, Side kSide, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    attend_sm90a(const Args<S> a, const __grid_constant__ HopperMaps maps) {
  extern __shared__ __align__(1024) char dynamic[];
  const Ring<S> ring(a, is_query_side(kSide) ? a.cursor : a.position);
  AttendHopper<S, kSide, T>(a, ring, maps, dynamic).run();
}

}  // namespace contaccum
