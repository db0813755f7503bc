// Plain structs handed from ops.cpp to the kernels: pointers, sizes, scalars; no torch.
//
// Glossary: n local rows, m passages per query, d embedding size, C capacity and F filled slots of
// the bank. A slot is one query, its m passages and their ids. "acc" is the accumulation type:
// double for double banks, float otherwise.
#pragma once

#include <cstdint>

namespace contaccum {

enum class Storage : int { f32, f64, bf16, f16 };

// BankState::expected: for each log-sum-exp of the table the expected score of the same columns
// under their softmax, 0 where there are none. First the entries of block_lse, then those of
// group_lse, then these rows, each of length C.
enum ExpectedState : int {
  kRowExpected,    // of kRowLse
  kBaseExpected,   // of kBaseLse
  kFreshWeighted,  // of kFreshSum, as a sum too: of exp(score - max) * score
  kOldExpected,    // of kOldLse
  kExpectedStates
};

// How slots are grouped; see contaccum_ext/layout.py. group | offset_block | block.
struct Layout {
  int64_t capacity, m, d;
  int64_t group, offset_block, block;

  int64_t blocks() const { return (capacity + block - 1) / block; }
  int64_t groups() const { return block / group; }
  int64_t expected_rows() const { return blocks() + groups() + kExpectedStates; }
  int64_t offset_blocks() const { return (capacity + offset_block - 1) / offset_block; }
  int64_t block_begin(int64_t b) const { return b * block; }
  int64_t block_end(int64_t b) const {
    return (b + 1) * block < capacity ? (b + 1) * block : capacity;
  }
};

// Rows of BankState::row_state, each of length C. With head block h = head / block:
enum RowState : int {
  kRowLse,    // log-sum-exp of the row over every banked column in the window: all the loss needs
  kBaseLse,   // ... over the window's whole blocks other than h
  kFreshMax,  // ... over the slots of h written since head entered it, as max
  kFreshSum,  //     and sum of exp(score - max): adding a column never rounds the logarithm again
  kOldLse,    // ... over the slots of h that head has yet to overwrite
  kPositive,  // score of the row with its own positive passage
  kRowStates
};

// The bank's buffers. Ring order: slot head is the next to be written.
struct BankState {
  void* queries;    // (C, d) storage
  void* passages;   // (C, m, d) storage
  int64_t* ids;     // (C, m), -1 where there is none
  int64_t* cursor;  // (2): head, fill
  void* block_lse;  // (blocks, C) acc: Invariant T; the entry of the head's block is in row_state
  void* group_lse;  // (groups, C) acc: behind head, groups of the next block; ahead of it, sums of
                    // this block's groups from there to its end, as they were before this lap
  void* row_state;  // (kRowStates, C) acc
  void* means;      // (2 + offset_blocks, 1 + m, d) acc: running mean; one per block; one for the
                    // part of head's offset block that head has yet to overwrite. [.., 0] queries
  void* expected;   // (expected_rows, C) acc, or null where the gradient of the scale is not kept
};

struct Batch {
  const void* queries;   // (n, d) storage
  const void* passages;  // (n, m, d) storage, positive first
  const int64_t* ids;    // (n, m) or null
  int64_t n;
  const void* companions;   // (n, companion_count, d) storage: enqueued only if they are finite too
  int64_t companion_count;  // of a row; perhaps 0
};

enum class Rebuild : int { none, window, table };

struct StepOptions {
  double scale;           // 1 / temperature
  int64_t window_blocks;  // whole blocks in use besides the head's; -1 for every slot
  bool weight_all_rows;   // row weight 1 / (n + F) instead of 1 / n
  bool banked_rows;       // banked queries are loss rows
  bool banked_columns;    // banked passages are columns (else only targets of their own rows)
  bool use_offsets;       // scores against banked vectors use mean_now - mean_of_block
  double drift_decay;     // decay of the running mean; negative: the mean is not tracked
  bool keep_expected;     // BankState::expected is there
  bool with_grad;
  bool with_scale_grad;  // only with with_grad, and where rows are banked with keep_expected
  bool enqueue;
  Rebuild rebuild;  // what of the table no longer fits scale or window
};

struct StepOutput {
  void* loss;        // () acc
  void* d_queries;   // (n, d) acc, or null without gradients
  void* d_passages;  // (n, m, d) acc, or null
  void* d_scale;     // () acc, or null
};

// A step, wherever it runs: all pointers are of one device.
struct StepArgs {
  Storage storage;  // of the bank; the batch has been converted to it
  Layout layout;
  BankState state;
  Batch batch;
  StepOptions options;
  StepOutput out;
};

// to = factor * from, rounded once.
struct ScaledGradient {
  const void* from;  // (count) acc
  void* to;          // (count) the inputs' dtype
  int64_t count;
};

struct ScaledGradients {
  Storage storage;  // of `to`, and what acc means
  Storage factor_storage;
  const void* factor;  // ()
  ScaledGradient queries, passages;
};

// Gradients of columns less their mean: what has come of it so far in an update, spread over the
// batches that are left.
struct Centering {
  Storage storage;  // of gradients and state: f32 or f64
  void* gradients;  // (rows, d) of one batch
  void* state;      // (2, d): what has not been taken out yet; batches since the update began
  int64_t rows, d;
  int64_t over;  // batches of an update
  bool keep;     // the batch is one of the update's: state goes on
};

}  // namespace contaccum
