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
    uint16_t weight[2][kLocal][kWeightStride];  // bank dtype: rounded, and what rounding left
  };
  static constexpr int kSharedBytes = (sizeof(Shared) + 15) / 16 * 16;
};

// Banked rows against columns: a plain product with both operands streamed by slices of d. More
// columns at once read the bank's rows less often; fewer waste less on a small batch.
template <int kColumns_>
struct RowsTile {
  static constexpr int kRows = 128, kColumns = kColumns_;
  static constexpr int kWarpRows =
      32;  // 64 registers of sums a thread with 128 columns: two thread
  static constexpr int kWarpColumns = kColumns / 2;  // blocks share a processor, so that one
                                                     // multiplies while the other sums
  static constexpr int kSlice = 64, kRowBytes = 2 * kSlice + 16;  // odd, in 16-byte units
  static constexpr int kStages = 3;                  // 108 KiB: twice that is what a processor has
  static constexpr int kScoreStride = kColumns + 2;  // two threads a row: distinct banks
  static constexpr int kMinOffsetBlock = 32;         // fewer slots: more runs than kRuns
  static constexpr int kRuns = kRows / kMinOffsetBlock + 2;
  static constexpr int kWarpsDown = kRows / kWarpRows;
  static_assert(kWarpsDown * (kColumns / kWarpColumns) == kWarps, "a part for each warp");
};

constexpr int kMaxStages = 3;  // two tiles in flight during a third
constexpr int kMmaMaxDim = 1024;

}  // namespace contaccum
