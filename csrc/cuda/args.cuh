// The argument that all kernels of a step share, passed by value.
#pragma once

#include "number.cuh"

namespace contaccum {

// A divisor known before the kernel starts: a product and a shift in place of an integer division,
// which is some twenty dependent instructions. For 0 <= x < 2^31.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int value) : value_(value) {
    while ((int64_t(1) << shift_) < value) ++shift_;
    factor_ =
        value < 1 ? 0 : uint32_t((uint64_t((int64_t(1) << shift_) - value) << 32) / value + 1);
  }
  __host__ __device__ operator int() const { return value_; }
  friend __device__ __forceinline__ int operator/(int x, const Divisor& by) {
    return int((__umulhi(uint32_t(x), by.factor_) + uint32_t(x)) >> by.shift_);
  }
  friend __device__ __forceinline__ int operator%(int x, const Divisor& by) {
    return x - x / by * by.value_;
  }

 private:
  int value_ = 0, shift_ = 0;
  uint32_t factor_ = 0;
};

// Local vectors in a row of biases: whole tiles, so that a row needs no end of its own.
__host__ __device__ inline int64_t padded_locals(int64_t locals) { return (locals + 63) / 64 * 64; }

template <class S>
struct Args {
  using A = Acc<S>;

  // Sizes. Slots and flat columns (slot * m + k) fit an int; ops.cpp has checked that.
  int n, d;
  Divisor m, capacity;
  Divisor group, offset_block, block;
  int groups, offset_blocks;
  Divisor blocks;

  // Options.
  A scale;
  int window_blocks;  // -1 for every slot
  bool weight_all_rows, banked_rows, banked_columns, use_offsets, with_grad;
  bool enqueue;      // the batch is written, unless it is not finite
  bool incremental;  // ... and the table is kept rather than rebuilt
  A drift_decay;     // negative: the running mean is not tracked

  // The bank; see BankState.
  S* queries;       // (C, d)
  S* passages;      // (C, m, d)
  int64_t* ids;     // (C, m)
  int64_t* cursor;  // (2): head, fill
  A* block_lse;     // (blocks, C)
  A* group_lse;     // (groups, C)
  A* row_state;     // (kRowStates, C)
  A* means;         // (2 + offset_blocks, 1 + m, d)
  A* expected;      // (expected rows, C), where expected scores are kept

  // The batch.
  const S* local_queries;    // (n, d)
  const S* local_passages;   // (n, m, d)
  const int64_t* local_ids;  // (n, m) or null
  const S* companions;       // (n, companion_count, d)
  int companion_count;

  // Scratch, how the work is split, and the output.
  int local_splits, bank_splits;      // of the query side: over local columns, over units
  int gradient_local, gradient_bank;  // splits of the passage side: over local, over banked rows
  int query_slice, passage_slice;     // sm_90a: part_out comes in parts of so many elements of d,
                                      // and 2^sharing splits share a place; else 0
  int sharing;
  Divisor parts;
  int unit_slots;  // a block is cut into `parts` units; a unit's log-sum-exp is never split
  int strips, strip_groups;  // groups of a block that one warp scores for a new row
  int row_blocks;            // thread blocks of the kernel over banked rows
  int rebuild_rows;          // rows rebuilt at once
  int64_t* position;  // (2) copy of cursor: the kernel that moves it must not also be read from
  int* not_finite;    // (n)
  A* part_max;        // (splits, n)
  A* part_sum;        // (splits, n)
  A* part_out;        // (places, n, d) or (places, n * m, d), one after the other; with a slice
                      // (places, locals / 64, d / slice, 64, slice)
  int* query_done;    // by place and block of local vectors: splits that have left their sums there
  int* passage_done;
  A* unit_lse;        // (units, n): local rows over banked columns, the new rows' table entries
  A* local_lse;       // (n)
  A* local_positive;  // (n) score of a local row with its own positive
  A* row_lse;         // (C): banked rows, local columns included
  double* losses;     // (n + row_blocks)
  double* terms;      // (n + row_blocks) of scale * dL / dscale, those of banked rows before
                      // their weight; null where it is not wanted
  // Offsets: of each row of stored means (from means[1] on) what it adds to scores, in base 2, and
  // itself, rounded. Null where no kernel of the step reads them.
  float* query_bias;      // (1 + offset_blocks, m, n padded)
  float* passage_bias;    // (1 + offset_blocks, n * m padded)
  Bf16* passage_offsets;  // (1 + offset_blocks, m, d)
  Bf16* query_offsets;    // (1 + offset_blocks, d)
  void* library;          // what launch_library.cu shares out
  A* group_part;          // (2, groups + 1, rows): new rows over the groups of head's block and the
                          // next; the last entry is what of a group head has yet to overwrite
  A* strip_part;          // (blocks, strips, rows): over the strips of other blocks
  A* group_part_expected;  // expected scores of the same, where they are kept
  A* strip_part_expected;
  A* entry_scores;  // of a rebuild that leaves products to torch; null where none does
  A* loss;          // ()
  A* d_queries;     // (n, d)
  A* d_passages;    // (n, m, d)
  A* d_scale;       // ()

  __device__ A* row(RowState which) const { return row_state + int64_t(which) * capacity; }
  // Of expected scores: of a block, of a group, and one of the rows that follow.
  __device__ A* expected_block(int b) const { return expected + int64_t(b) * capacity; }
  __device__ A* expected_group(int k) const { return expected_block(blocks + k); }
  __device__ A* expected_row(ExpectedState which) const {
    return expected_block(blocks + groups + which);
  }
  __device__ const A* mean(int index, int kind) const {
    return means + (int64_t(index) * (1 + m) + kind) * d;
  }
  __device__ bool masked() const { return local_ids != nullptr; }
  __host__ __device__ int places(int splits, int slice) const {
    return slice ? (splits + (1 << sharing) - 1) >> sharing : splits;
  }
  // What the sums of splits [first, last) in one place are relative to, for a local row.
  __device__ A max_of_splits(int first, int last, int row) const {
    const A* of = part_max + int64_t(first) * n + row;
    A top = *of;
#pragma unroll 1  // few, and registers are scarce where this is called
    while (++first < last) {
      of += n;
      top = *of > top ? *of : top;
    }
    return top;
  }
  // Elements of part_out at one place.
  __host__ __device__ int64_t place_size(int64_t locals, int slice) const {
    return slice ? padded_locals(locals) * ((d + slice - 1) / slice * slice) : locals * d;
  }
};

// Dimensions of a thread block of the kernels that stream vectors.
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxDim = 4096;
constexpr int kMaxSplits = 512;  // of the query side: their weights are held in shared memory

// A warp scores kTileRows<A> bank vectors against kLocals<A> local ones: one score a lane.
template <class A>
constexpr int kLocals = sizeof(A) == 8 ? 4 : 8;  // doubles: half, or the sums do not fit registers
template <class A>
constexpr int kTileRows = 32 / kLocals<A>;

}  // namespace contaccum
