// The one table of tile sizes of the tensor-core kernels, and which resource limits each.
#pragma once

#include "args.cuh"

namespace contaccum {

// MT: 16-element slices of d that a warp owns, d <= 128 MT. NT: local vectors of a thread block
// / 8.
template <int MT_, int NT_>
struct MmaTile {
  static constexpr int MT = MT_, NT = NT_;
  static constexpr int kLocal = 8 * NT;   // 32 locals by 768 elements are 96 registers of sums a
                                          // thread, 48 of local vectors: with MT 8 they would spill
  static constexpr int kBank = 32;        // bank vectors a tile: three stages of 32 by 768 elements
                                          // are 156 of 227 KiB of shared memory
  static constexpr int kSlice = 16 * MT;  // elements of d that a warp owns
  static constexpr int kRowBytes = 2 * kSlice + 16;  // an odd number of 16-byte units: eight rows
                                                     // of a matrix lie in distinct banks
  static constexpr int kStageBytes = kWarps * kBank * kRowBytes;
  static constexpr int kPartStride = kBank + 4;  // floats: rows of four lanes in distinct banks
  static constexpr int kWeightStride = kBank + 8;

  struct Shared {
    float part[kWarps][kLocal][kPartStride];  // scores, apart by the warps' slices of d
    float bias[kLocal][kBank];                // by kind of passage
    float mass[kLocal][kBank];
    float shrink[kLocal];
    uint16_t weight[kLocal][kWeightStride];  // bank dtype
  };
  static constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
};

// Banked rows against columns: a plain product with both operands streamed by slices of d. More
// columns at once read the bank's rows less often; fewer waste less on a small batch. Where rows
// are few too, eight slices in flight hide the way to memory, and warps share d.
template <int kRows_, int kColumns_, int kStages_>
struct RowsTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kStages = kStages_;  // 128 by 128: 108 KiB, half of what a processor has
  // 64 registers of sums a thread with 128 by 128: two thread blocks share a processor, so that one
  // multiplies while the other sums.
  static constexpr int kWarpRows = kRows >= 128 ? 32 : 16, kWarpColumns = kColumns / 2;
  static constexpr int kWarpsDown = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarpsDeep = kWarps / (kWarpsDown * kWarpsAcross);
  static constexpr int kSlice = 64, kRowBytes = 2 * kSlice + 16;  // odd, in 16-byte units
  static constexpr int kLanes = kThreads / kRows;                 // threads of a row
  static constexpr int kScoreStride = kColumns + kLanes;  // what a warp reads: distinct banks
  static constexpr int kMinOffsetBlock = 32;              // fewer slots: more runs than kRuns
  static constexpr int kRuns = (kRows + kMinOffsetBlock - 1) / kMinOffsetBlock + 2;
  static_assert(kWarpsDown * kWarpsAcross * kWarpsDeep == kWarps, "a share for each warp");
  static_assert(kSlice / 16 % kWarpsDeep == 0 && kWarpColumns % 16 == 0, "whole loads of matrices");
  static_assert(kLanes <= 32 && kColumns % 32 == 0, "a row's threads belong to one warp");
};
using FewRows = RowsTile<32, 32, 8>;  // 73 KiB: two thread blocks a processor, one on sm_86
using NarrowRows = RowsTile<128, 64, 3>;
using WideRows = RowsTile<128, 128, 3>;

// New rows against columns of a block, for the table: RowsTile's product. Where rows and columns
// are few, eight slices in flight hide the way to memory, and warps share d, or their chains of
// products would take longer than the copies.
template <int kRows_, int kColumns_, int kStages_>
struct EntriesTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kWarpRows = kRows >= 128 ? 32 : 16;
  static constexpr int kWarpColumns = kColumns / 2;
  static constexpr int kWarpsDown = kRows / kWarpRows, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarpsDeep = kWarps / (kWarpsDown * kWarpsAcross);
  static constexpr int kSlice = 64, kRowBytes = 2 * kSlice + 16;  // odd, in 16-byte units
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kParts = kThreads / kRows;  // threads of a row
  // Odd: a row a lane, in distinct banks. 32 x + 9: no more than two lanes meet when they write.
  static constexpr int kScoreStride = kColumns + 9;
  // With ids, places, and the sums of parts of rows.
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kColumns * 12 + kRows * 4 + kParts * kRows * 8;
  static_assert(kWarpsDown * kWarpsAcross * kWarpsDeep == kWarps, "a share for each warp");
  static_assert(kSlice / 16 % kWarpsDeep == 0 && kWarpColumns % 16 == 0, "whole loads of matrices");
  static_assert(kRows % 32 == 0, "a warp's threads belong to one part of their rows");
  static_assert(kWarpsDeep * kRows * kScoreStride * 4 <= kStages * kStageBytes,
                "scores take the place of slices");
};

// Hopper: kSlice elements of d a block, half of the vectors' where two blocks share them.
template <int kSlice_, int kCluster_, int kStages_>
struct HopperTile {
  static constexpr int kSlice = kSlice_, kCluster = kCluster_;
  static constexpr int kStages = kStages_;  // what 227 KiB of shared memory leave beside the locals
  static constexpr int kLocal = 64;
  static constexpr int kGroup = 128;            // threads of a warpgroup
  static constexpr int kThreads = 4 * kGroup;   // one scores, two sum, one copies
  static constexpr int kColumns = kSlice / 64;  // boxes of 64 vectors by 64 elements
  static constexpr int kSums = kColumns / 2;    // boxes of a summing warpgroup: 32 registers each
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static constexpr int kOperandBytes = kColumns * kBoxBytes;
  static constexpr int kWeightBytes = 64 * 64 * 2;
};

// Registers of a thread, by what its warpgroup does. Together 512: four times the 128 that 512
// threads begin with. 96 sums and what adds two splits' want 128, the walk over tiles 48 to 56; the
// 200 to 208 that are left are enough to score. Beside 128 sums 152 are; on the query side that is
// too few, so that the walk makes do with 24 and leaves 168.
template <class T, bool kQueries, bool kOffsets>
struct HopperRegisters {
  static constexpr bool kManySums = T::kSums > 3;
  static constexpr int kSum = kManySums ? 160 : 128;
  static constexpr int kCopy = kManySums ? kQueries ? 24 : 40 : kQueries && kOffsets ? 48 : 56;
  static constexpr int kScore = 512 - 2 * kSum - kCopy;
};

// Calls f with the tile for vectors of d elements.
template <class F>
auto with_tile_sm90a(int64_t d, F f) {
  if (d <= 128) return f(HopperTile<128, 1, 6>{});
  if (d <= 384) return f(HopperTile<384, 1, 3>{});
  if (d <= 768) return f(HopperTile<384, 2, 3>{});
  return f(HopperTile<512, 2, 2>{});
}
// Elements of d that a thread block sums.
inline int sm90a_slice(int64_t d) {
  return with_tile_sm90a(d, [](auto tile) { return decltype(tile)::kSlice; });
}

// Banked rows on Hopper: 128 rows by kTiles * 64 columns, of which four are 128 registers of
// scores.
template <int kTiles_, int kStages_>
struct HopperRowsTile {
  static constexpr int kTiles = kTiles_, kStages = kStages_;  // 192 KiB of slices in flight
  static constexpr int kGroup = 128, kThreads = 3 * kGroup;   // two warpgroups score, one copies
  static constexpr int kWarpsScoring = 2 * kGroup / 32;
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static constexpr int kCopyRegisters = 56, kScoreRegisters = 224;
};

constexpr int kMaxStages = 3;  // two tiles in flight during a third
constexpr int kMmaMaxDim = 1024;

}  // namespace contaccum
