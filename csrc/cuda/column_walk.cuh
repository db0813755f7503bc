// The columns that banked rows meet in rows_sm90a.cuh, in tiles of up to 64.
#pragma once

#include "ring.cuh"
#include "tensor_map.h"

namespace contaccum {

// Up to 64 columns that one product covers.
struct alignas(16) ColumnTile {  // which is read at once
  enum { piece, groups, rest } kind;
  bool local;      // else of the bank
  int begin, end;  // flat: slot * m + kind of passage
  int row_end;     // piece: the batch rows before row_end are done with this tile, if it `ends`
  bool ends;
  int group, count;  // groups: the first, and how many
};

// The columns that the rows meet, in the order of csrc/cpu/plan.cpp: the parts of the batch that
// land in one block of slots; groups of the block that head enters; groups of the block after it;
// the rest of a group that head divides.
template <class S>
class ColumnWalk {
 public:
  __device__ ColumnWalk(const Args<S>& args, const Ring<S>& r, bool upkeep_)
      : a(args), ring(r), upkeep(upkeep_), per_tile(kBoxRows / (args.group * args.m)) {}

  __device__ bool next() {
    if (phase == 0) {
      if (column >= piece_end * a.m && piece_end < a.n) {
        const int to = ring.slot_of(piece_end);
        const int room = ring.block_end(to / a.block) - to;
        piece_end = upkeep ? min(a.n, piece_end + room) : a.n;
      }
      if (column < piece_end * a.m) {
        const int end = min(column + kBoxRows, piece_end * a.m);
        tile = {ColumnTile::piece, true, column, end, piece_end, end == piece_end * a.m, 0, 0};
        column = end;
        return true;
      }
      if (!upkeep) return false;
      const Ring<S> after = ring.after();
      const bool crosses = ring.crosses();
      phase = 1;
      if (crosses)
        set_groups(
            after.block(),
            max(after.first_old(), ring.next_block() == after.block() ? ring.passed_groups() : 0),
            a.groups);
    }
    while (phase < 3) {
      if (group < group_end) {
        const int count = min(per_tile, group_end - group), from = block * a.block;
        const int begin = from + group * a.group;
        const int end = max(begin, min(from + (group + count) * a.group, limit));
        tile = {ColumnTile::groups, false, begin * a.m, end * a.m, 0, false, group, count};
        group += count;
        return true;
      }
      const Ring<S> after = ring.after();
      if (++phase == 2)
        set_groups(after.next_block(), ring.crosses() ? 0 : ring.passed_groups(),
                   after.passed_groups());
    }
    if (phase++ > 3) return false;
    const Ring<S> after = ring.after();
    const int passed = after.passed_groups(), current = after.block();
    const int end =
        min(current * a.block + (passed + 1) * a.group, min(ring.block_end(current), ring.fill));
    if (passed == after.first_old() || after.head >= end) return false;
    tile = {ColumnTile::rest, false, after.head * a.m, end * a.m, 0, true, 0, 0};
    return true;
  }

  ColumnTile tile;

 private:
  __device__ void set_groups(int b, int begin, int end) {
    block = b;
    group = begin;
    group_end = end;
    limit = min(ring.block_end(b), ring.fill);
  }

  const Args<S>& a;
  const Ring<S>& ring;
  const bool upkeep;
  const int per_tile;  // groups
  int phase = 0, column = 0, piece_end = 0;
  int block = 0, group = 0, group_end = 0, limit = 0;
};

}  // namespace contaccum
