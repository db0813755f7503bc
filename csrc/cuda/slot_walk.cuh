// What one split of a streaming pass reads, in tiles for attend_sm90a.cuh: its share of the local
// vectors, then its share of the bank. A tile is at most kBoxRows slots of one kind of passage; it
// never crosses a multiple of kBoxRows, a run or a unit.
#pragma once

#include "ring.cuh"
#include "tensor_map.h"

namespace contaccum {

// Where the probability mass of the slots from `slot` on is kept: a group of kBoxRows slots has one
// mean, but for the group that head divides.
template <class S>
__device__ int mass_index(const Args<S>& a, const Ring<S>& ring, int slot) {
  const int g = slot / kBoxRows;
  const bool older = slot >= ring.head && g == ring.head / kBoxRows && ring.head % kBoxRows != 0;
  return older ? (int(a.capacity) + kBoxRows - 1) / kBoxRows : g;
}

struct SlotTile {
  int slot, count, kind;
  int mean;  // their row of means, or -1 without offsets
  int unit;
  bool local, in_loss, for_table;
};

// What the first lane of a warp has.
__device__ __forceinline__ SlotTile from_first_lane(SlotTile t) {
  const auto spread = [](int x) { return __shfl_sync(0xffffffffu, x, 0); };
  const int flags = spread(int(t.local) | int(t.in_loss) << 1 | int(t.for_table) << 2);
  t.slot = spread(t.slot);
  t.count = spread(t.count);
  t.kind = spread(t.kind);
  t.mean = spread(t.mean);
  t.unit = spread(t.unit);
  t.local = flags & 1;
  t.in_loss = flags & 2;
  t.for_table = flags & 4;
  return t;
}

template <class S, bool kQuerySide>
class SlotWalk {
 public:
  __device__ SlotWalk(const Args<S>& args, const Ring<S>& r, int split, int splits)
      : a(args), ring(r) {
    const int64_t local_tiles = (a.n + kBoxRows - 1) / kBoxRows;
    local_begin = int(local_tiles * split / splits) * kBoxRows;
    local_end = min(int(local_tiles * (split + 1) / splits) * kBoxRows, a.n);
    if constexpr (kQuerySide) {
      const int64_t units = a.blocks * a.parts;
      first_unit = int(units * split / splits);
      last_unit = int(units * (split + 1) / splits);
      tile.unit = first_unit - 1;
    } else {
      const int64_t tiles = (ring.fill + kBoxRows - 1) / kBoxRows;
      slot = int(tiles * split / splits) * kBoxRows;
      slot_end = a.banked_rows ? min(int(tiles * (split + 1) / splits) * kBoxRows, ring.fill) : 0;
    }
  }

  // Whether there is another tile.
  __device__ bool next() {
    while (at >= run_end) {
      if (run_begin < run_end && ++tile.kind < (kQuerySide ? int(a.m) : 1)) {
        at = run_begin;
      } else {
        tile.kind = 0;
        if (!next_run()) return false;
      }
    }
    tile.slot = at;
    tile.count = min(run_end - at, kBoxRows - at % kBoxRows);
    at += tile.count;
    return true;
  }

  SlotTile tile{};
  int first_unit = 0, last_unit = 0;

 private:
  __device__ bool next_run() {
    if (!past_locals) {
      past_locals = true;
      at = run_begin = local_begin;
      run_end = local_end;
      tile.local = tile.in_loss = true;
      tile.mean = -1;
      return true;
    }
    tile.local = false;
    while (slot >= slot_end) {
      if (!kQuerySide || ++tile.unit >= last_unit) return false;
      const int b = tile.unit / a.parts;
      slot = b * a.block + tile.unit % a.parts * a.unit_slots;
      slot_end = min(min(slot + a.unit_slots, ring.block_end(b)), ring.fill);
      tile.for_table = a.incremental && !ring.is_direct(b);
    }
    Run run = ring.run(slot, slot_end);
    // A unit lies in one block: without offsets nothing but head can divide it.
    if (kQuerySide && !a.use_offsets && (slot >= ring.head || slot_end <= ring.head))
      run.end = slot_end;
    slot = run.end;
    tile.in_loss = run.in_window && (kQuerySide ? a.banked_columns : a.banked_rows);
    tile.mean = a.use_offsets && tile.in_loss ? run.mean : -1;
    at = run_begin = run.begin;
    run_end = tile.in_loss || tile.for_table ? run.end : run.begin;
    return true;
  }

  const Args<S>& a;
  const Ring<S>& ring;
  bool past_locals = false;
  int local_begin, local_end;
  int slot = 0, slot_end = 0;
  int at = 0, run_begin = 0, run_end = 0;
};

}  // namespace contaccum
