// What one step will touch, worked out from head and fill before any number is computed.
#pragma once

#include <cstdint>
#include <vector>

#include "../params.h"

namespace contaccum {

// Slots [begin, end) that share a block, an offset and their standing towards the window.
struct Segment {
  int64_t begin, end;
  int64_t block;
  int64_t mean;  // their row of BankState::means
  bool in_window;
};

// The part of a batch that lands in one block.
struct Piece {
  int64_t block, begin, end;  // slots
  int64_t row;                // the batch row that goes to slot `begin`
  bool completes;             // fills the block to its end: head moves on to the next block
};

// Banked columns that every surviving row is scored against to keep the table, besides the batch.
struct UpkeepGroup {
  enum Kind {
    ageing,
    ahead,
    rest
  } kind;              // group_lse of head's block / of the next block /
                       // what is left of the group that head stands in
  int64_t index;       // row of group_lse
  int64_t begin, end;  // slots, possibly none
};

struct Plan {
  int64_t head = 0, fill = 0;            // before the step
  int64_t next_head = 0, next_fill = 0;  // after it
  int64_t rows_in_window = 0;
  std::vector<Segment> columns;             // at most column_tile slots each; all filled slots
  std::vector<Segment> rows;                // at most row_tile slots each; all filled slots
  std::vector<int64_t> window_blocks;       // whole blocks in the window besides head's, before
  std::vector<int64_t> next_window_blocks;  // and after the step

  // Enqueue.
  int64_t count = 0;           // slots written: min(n, C); rows n - count .. n - 1
  bool rebuild_after = false;  // the batch replaces nearly the whole ring
  bool crosses = false;        // head leaves its block
  std::vector<Piece> pieces;
  std::vector<UpkeepGroup> upkeep;
  std::vector<char> direct;  // (blocks) new rows are scored against these afresh,
                             // for the others the loss has done it
};

Plan make_plan(const Layout& layout, const StepOptions& options, int64_t head, int64_t fill,
               int64_t n);

constexpr int64_t kRowTile = 64;
constexpr int64_t kColumnTile = 128;  // columns, so slots * m

}  // namespace contaccum
