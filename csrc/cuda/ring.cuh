// Where the ring stands and where it goes: csrc/cpu/plan.cpp without lists, each fact worked out
// where it is needed, from head and fill in device memory.
#pragma once

#include "args.cuh"

namespace contaccum {

// Slots [begin, end) that share a stored mean and their standing towards the window.
struct Run {
  int begin, end;
  int mean;  // their row of BankState::means
  bool in_window;
};

template <class S>
struct Ring {
  const Args<S>& a;
  int head, fill;

  // position: head and fill; held to the buffers' size, so that no cursor can lead out of them.
  __device__ Ring(const Args<S>& args, const int64_t* position) : a(args), head(0), fill(0) {
    if (a.capacity == 0) return;
    const int64_t h = position[0], f = position[1];
    head = h < 0 || h >= a.capacity ? 0 : int(h);
    fill = f < 0 ? 0 : f > a.capacity ? int(a.capacity) : int(f);
  }

  __device__ int block() const { return head / a.block; }
  __device__ int offset() const { return head % a.block; }
  __device__ int next_block() const { return (block() + 1) % a.blocks; }
  __device__ int passed_groups() const { return offset() / a.group; }  // wholly behind head
  __device__ int first_old() const { return (offset() + a.group - 1) / a.group; }  // wholly ahead
  __device__ int block_end(int b) const { return min((b + 1) * a.block, int(a.capacity)); }

  // Whole blocks in the window besides head's.
  __device__ int whole_blocks() const {
    return a.window_blocks < 0 ? a.blocks - 1 : min(a.window_blocks, a.blocks - 1);
  }
  __device__ int window_block(int age) const { return (block() - age + a.blocks) % a.blocks; }
  __device__ bool is_whole(int b) const {
    const int age = (block() - b + a.blocks) % a.blocks;
    return age >= 1 && age <= whole_blocks();
  }
  __device__ bool in_window(int slot) const {
    const int b = slot / a.block;
    return b == block() ? slot < head || a.window_blocks < 0 : is_whole(b);
  }
  // Head's offset block holds two generations: slots from head on are a lap older.
  __device__ int mean_of(int slot) const {
    const int b = slot / a.offset_block;
    const bool older = slot >= head && head / a.offset_block == b && head % a.offset_block != 0;
    return older ? 1 + a.offset_blocks : 1 + b;
  }
  __device__ Run run(int begin, int limit) const {
    int end = min(limit, (begin / a.offset_block + 1) * a.offset_block);
    if (begin < head) end = min(end, head);
    return {begin, end, mean_of(begin), in_window(begin)};
  }
  __device__ int rows_in_window() const {
    if (a.window_blocks < 0) return fill;
    const int whole = whole_blocks(), before = min(whole, block()), wrapped = whole - before;
    const int first = (a.blocks - wrapped) * a.block;  // the older end of the ring
    return head - (block() - before) * a.block + (wrapped > 0 ? max(0, fill - first) : 0);
  }
  __device__ double row_weight() const {
    return 1.0 / double(a.weight_all_rows && a.banked_rows ? a.n + rows_in_window() : a.n);
  }

  // After the batch has been written.
  __device__ Ring after() const {
    Ring next(*this);
    next.head = (head + a.n) % a.capacity;
    next.fill = min(int(a.capacity), fill + a.n);
    return next;
  }
  // Slots written: min(n, C) from first_slot() on, by batch rows n - count() .. n - 1.
  __device__ int count() const { return min(a.n, int(a.capacity)); }
  __device__ int slot_of(int row) const { return (head + row) % a.capacity; }
  __device__ int first_slot() const { return slot_of(a.n - count()); }
  // The batch row that is written to a slot, or -1.
  __device__ int row_to(int slot) const {
    const int i = (slot - first_slot() + a.capacity) % a.capacity;
    return i < count() ? a.n - count() + i : -1;
  }
  __device__ bool is_written(int slot) const { return row_to(slot) >= 0; }
  __device__ bool crosses() const {  // head leaves its block; only asked when the table is kept
    return head + a.n >= block_end(block());
  }
  // Blocks that the batch touches, in ring order.
  __device__ int touched() const {
    const int last = slot_of(a.n - 1) / a.block;
    return (last - first_slot() / a.block + a.blocks) % a.blocks + 1;
  }
  __device__ bool is_touched(int b) const {
    return (b - first_slot() / a.block + a.blocks) % a.blocks < touched();
  }
  // New rows are scored against these blocks afresh; for the others the loss has done it.
  __device__ bool is_direct(int b) const {
    const Ring next = after();
    return is_touched(b) || b == next.block() || b == next.next_block();
  }
};

// Whether the batch goes into the bank: by Cauchy-Schwarz no score overflows when no scaled squared
// norm does. Called by whole thread blocks.
template <class S>
__device__ bool batch_is_finite(const Args<S>& a) {
  int bad = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) bad |= a.not_finite[i];
  return !__syncthreads_or(bad);
}

}  // namespace contaccum
