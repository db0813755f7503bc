// Tiles of bank vectors, scored with a block's local vectors: by the scoring warpgroup of
// attend_sm90a.cuh. Two blocks that share the elements of d exchange their parts of the scores.
#pragma once

#include "attend_sm90a_shared.cuh"

namespace contaccum {

template <class S, class T, bool kOffsets>
class TileScores {
  static constexpr int kScores = 32;

 public:
  __device__ __forceinline__ TileScores(HopperShared<T>& shared, int rank_)
      : sh(shared),
        rank(rank_),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        first_operand(__shfl_sync(0xffffffffu, matrix_at(shared_address(shared.local)), 0)) {}

  // Read by the lane that also arrives at the barriers behind which the next tile is written.
  __device__ __forceinline__ SlotTile tile(int i) const {
    return from_first_lane(lane == 0 ? sh.slots[i % T::kStages] : SlotTile{});
  }

  // Whether tile i, once it is there, is one of slots.
  __device__ __forceinline__ bool wait_slots(int i) const {
    barrier_wait(at(sh.full[i % T::kStages]), i / T::kStages & 1);
    const SlotTile& t = sh.slots[i % T::kStages];
    return __any_sync(0xffffffffu, lane == 0 && t.count > 0 && !(kOffsets && t.offsets));
  }

  // The block's share of the scores of tile i: bank x local vectors, over its elements of d.
  __device__ __forceinline__ void start(int i, float (&s)[kScores]) {
    hold(s);
    products_begin();
    static_assert(offsetof(HopperShared<T>, tile) ==
                  offsetof(HopperShared<T>, local) + T::kOperandBytes);
    uint32_t locals = first_operand;
    // Or the 24 descriptions behind it would be kept from tile to tile, where registers are scarce.
    hold(locals);
    const uint32_t bank = locals + (1 + i % T::kStages) * (T::kOperandBytes >> 4);
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c)
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k) {
        const int step = (c * T::kBoxBytes + k * 32) >> 4;  // 16 elements along the rows
        product<S, false>(s, bank + step, locals + step, c + k > 0);
      }
    products_commit();
  }
  __device__ __forceinline__ void end(float (&s)[kScores]) {
    products_wait<0>();
    hold(s);
  }
  // To the thread of the same place in the other block: the sums are the same bits in both.
  __device__ __forceinline__ void send(int i, const float (&s)[kScores]) {
    if constexpr (T::kCluster == 2) {
      if (i > 0) barrier_wait(at(sh.partial_empty), (i - 1) & 1);
      const uint32_t barrier = shared_of(at(sh.partial_full), rank ^ 1);
#pragma unroll
      for (int q = 0; q < kScores / 4; ++q)
        store_there(shared_of(at(sh.partial[q][thread]), rank ^ 1), s[4 * q], s[4 * q + 1],
                    s[4 * q + 2], s[4 * q + 3], barrier);
    }
  }
  __device__ __forceinline__ void receive(int i, float (&s)[kScores]) {
    if constexpr (T::kCluster == 2) {
      if (thread == 0) barrier_expect(at(sh.partial_full), sizeof(sh.partial));
      barrier_wait(at(sh.partial_full), i & 1);
#pragma unroll
      for (int q = 0; q < kScores / 4; ++q) {
        const float4 other = sh.partial[q][thread];
        s[4 * q] += other.x;
        s[4 * q + 1] += other.y;
        s[4 * q + 2] += other.z;
        s[4 * q + 3] += other.w;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive_there(shared_of(at(sh.partial_empty), rank ^ 1));
    }
  }

 private:
  HopperShared<T>& sh;
  const int rank, thread, lane;
  // Descriptions of operands are counted from that of the locals. It is a lane's for all lanes:
  // from anything less clearly uniform the compiler may work out all of them in registers of a
  // thread and move each to where products take it from.
  const uint32_t first_operand;
};

}  // namespace contaccum
