// What one split of a streaming pass reads, in tiles for attend_sm90a.cuh: its share of the local
// vectors, then its share of the bank. A tile is at most kBoxRows slots of one kind of passage; it
// never crosses a multiple of kBoxRows, a run or a unit, so it has one offset. Behind the tiles of
// up to kOffsetsAtOnce offsets that follow each other in memory comes a tile of those offsets.
#pragma once

#include "ring.cuh"
#include "tensor_map.h"

namespace contaccum {

// So many offsets in a tile; a product takes kOffsetRows of its rows.
constexpr int kOffsetsAtOnce = 8, kOffsetRows = 16;

struct SlotTile {
  int slot, count, kind;  // offsets: the first, and how many
  int offset;             // theirs, as a row of passage_offsets or query_offsets; -1 without
  int unit;
  bool local : 1, in_loss : 1, for_table : 1;
  bool offsets : 1;  // no slots
};

// What the first lane of a warp has.
__device__ __forceinline__ SlotTile from_first_lane(SlotTile t) {
  const auto spread = [](int x) { return __shfl_sync(0xffffffffu, x, 0); };
  const int flags =
      spread(int(t.local) | int(t.in_loss) << 1 | int(t.for_table) << 2 | int(t.offsets) << 3);
  t.slot = spread(t.slot);
  t.count = spread(t.count);
  t.kind = spread(t.kind);
  t.offset = spread(t.offset);
  t.unit = spread(t.unit);
  t.local = flags & 1;
  t.in_loss = flags & 2;
  t.for_table = flags & 4;
  t.offsets = flags & 8;
  return t;
}

template <class S, bool kQuerySide, bool kOffsets>
class SlotWalk {
 public:
  __device__ SlotWalk(const Args<S>& args, const Ring<S>& r, int split, int splits)
      : a(args), ring(r) {
    const int64_t local_tiles = (a.n + kBoxRows - 1) / kBoxRows;
    // Rounded up: the bank's shares, rounded down, are small where these are not.
    at = run_begin = int((local_tiles * split + splits - 1) / splits) * kBoxRows;
    run_end = min(int((local_tiles * (split + 1) + splits - 1) / splits) * kBoxRows, a.n);
    slots.local = slots.in_loss = true;
    if constexpr (kQuerySide) {
      const int64_t units = a.blocks * a.parts;
      last_unit = int(units * (split + 1) / splits);
      slots.unit = int(units * split / splits) - 1;
    } else {
      const int64_t tiles = (ring.fill + kBoxRows - 1) / kBoxRows;
      slot = int(tiles * split / splits) * kBoxRows;
      slot_end = a.banked_rows ? min(int(tiles * (split + 1) / splits) * kBoxRows, ring.fill) : 0;
    }
  }

  // Whether there is another tile.
  __device__ bool next() {
    if (offsets_next) {  // and behind them, what was found before them
      offsets_next = false;
      offset_count = 0;
    } else {
      more = next_slots();
      offsets_next = offset_count > 0 && !(more && has_room());
    }
    if (!offsets_next && more) add_offset();
    return offsets_next || more;
  }
  // The tile that next() has found.
  __device__ SlotTile tile() const {
    if (!offsets_next) return slots;
    return {first_offset, offset_count, 0, -1, 0, false, true, false, true};
  }

 private:
  __device__ bool has_offset() const { return kOffsets && slots.offset >= 0 && a.with_grad; }
  // Whether the tile's offset, if any, is the last one or follows it.
  __device__ bool has_room() const {
    const int place = slots.offset - first_offset;
    return !has_offset() || place == offset_count - 1 ||
           (place == offset_count && place < kOffsetsAtOnce);
  }
  __device__ void add_offset() {
    if (!has_offset()) return;
    if (offset_count == 0) first_offset = slots.offset;
    offset_count = slots.offset - first_offset + 1;
  }

  // The next tile of slots; none again once there is none.
  __device__ bool next_slots() {
    while (at >= run_end) {
      if (run_begin < run_end && ++slots.kind < kinds()) {
        at = run_begin;
      } else {
        slots.kind = 0;
        if (!next_run()) {
          run_begin = run_end;
          return false;
        }
      }
    }
    slots.slot = at;
    slots.count = min(run_end - at, kBoxRows - at % kBoxRows);
    slots.offset = mean < 0 ? -1 : (mean - 1) * kinds() + slots.kind;
    at += slots.count;
    return true;
  }
  __device__ int kinds() const { return kQuerySide ? int(a.m) : 1; }

  __device__ bool next_run() {
    slots.local = false;
    while (slot >= slot_end) {
      if (!kQuerySide || ++slots.unit >= last_unit) return false;
      const int b = slots.unit / a.parts;
      slot = b * a.block + slots.unit % a.parts * a.unit_slots;
      slot_end = min(min(slot + a.unit_slots, ring.block_end(b)), ring.fill);
      slots.for_table = a.incremental && !ring.is_direct(b);
    }
    Run run = ring.run(slot, slot_end);
    // A unit lies in one block: without offsets nothing but head can divide it.
    if (kQuerySide && !a.use_offsets && (slot >= ring.head || slot_end <= ring.head))
      run.end = slot_end;
    slot = run.end;
    slots.in_loss = run.in_window && (kQuerySide ? a.banked_columns : a.banked_rows);
    mean = a.use_offsets && slots.in_loss ? run.mean : -1;
    at = run_begin = run.begin;
    run_end = slots.in_loss || slots.for_table ? run.end : run.begin;
    return true;
  }

  const Args<S>& a;
  const Ring<S>& ring;
  SlotTile slots{};
  bool more = true;                        // `slots` is a tile
  bool offsets_next = false;               // but offsets come first
  int first_offset = 0, offset_count = 0;  // of tiles already given
  int mean = -1;                           // of the run
  int last_unit = 0;
  int slot = 0, slot_end = 0;
  int at = 0, run_begin = 0, run_end = 0;
};

}  // namespace contaccum
