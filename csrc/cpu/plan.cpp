#include "plan.h"

#include <algorithm>

namespace contaccum {
namespace {

std::vector<int64_t> blocks_in_window(const Layout& y, int64_t head, int64_t window_blocks) {
  const int64_t blocks = y.blocks(), current = head / y.block;
  const int64_t whole = window_blocks < 0 ? blocks - 1 : std::min(window_blocks, blocks - 1);
  std::vector<int64_t> list;
  for (int64_t age = 1; age <= whole; ++age) list.push_back((current - age + blocks) % blocks);
  return list;
}

// Cut the filled slots at block, offset block and head, then to tiles.
std::vector<Segment> segments(const Layout& y, const Plan& plan, int64_t window_blocks,
                              int64_t tile) {
  std::vector<char> whole(y.blocks(), 0);
  for (int64_t b : plan.window_blocks) whole[b] = 1;
  const int64_t current = plan.head / y.block, spare = 1 + y.offset_blocks();
  std::vector<Segment> list;
  for (int64_t begin = 0; begin < plan.fill;) {
    const int64_t offset_block = begin / y.offset_block, block = begin / y.block;
    int64_t end = std::min({begin + tile, (offset_block + 1) * y.offset_block, plan.fill});
    if (begin < plan.head) end = std::min(end, plan.head);
    // Head's offset block holds two generations: slots from head on are a lap older.
    const bool older = begin >= plan.head && plan.head / y.offset_block == offset_block &&
                       plan.head % y.offset_block != 0;
    const bool fresh_or_all = begin < plan.head || window_blocks < 0;
    list.push_back({begin, end, block, older ? spare : 1 + offset_block,
                    block == current ? fresh_or_all : whole[block] != 0});
    begin = end;
  }
  return list;
}

void plan_enqueue(const Layout& y, const StepOptions& options, int64_t n, Plan& plan) {
  const int64_t capacity = y.capacity, blocks = y.blocks();
  plan.count = std::min(n, capacity);
  plan.next_head = (plan.head + n) % capacity;
  plan.next_fill = std::min(capacity, plan.fill + n);
  plan.direct.assign(blocks, options.keep_expected);  // the loss takes no expected scores

  int64_t slot = (plan.head + n - plan.count) % capacity, row = n - plan.count;
  while (row < n) {
    const int64_t block = slot / y.block, last = y.block_end(block);
    const int64_t end = std::min(slot + n - row, last);
    plan.pieces.push_back({block, slot, end, row, end == last});
    plan.direct[block] = 1;
    plan.crosses |= end == last;
    row += end - slot;
    slot = end % capacity;
  }
  // Beyond this the slots that upkeep reads would themselves be overwritten by the batch.
  plan.rebuild_after = plan.count > capacity - 2 * y.block;
  if (plan.rebuild_after) return;

  const int64_t current = plan.next_head / y.block, next = (current + 1) % blocks;
  plan.direct[current] = plan.direct[next] = 1;
  const int64_t offset = plan.next_head % y.block;
  const int64_t passed = offset / y.group;                     // groups wholly behind head
  const int64_t first_old = (offset + y.group - 1) / y.group;  // first one wholly ahead of it
  auto add = [&](UpkeepGroup::Kind kind, int64_t block, int64_t k, int64_t from) {
    const int64_t begin = y.block_begin(block) + std::max(k * y.group, from);
    const int64_t limit = std::min(y.block_end(block), plan.fill);
    const int64_t end = std::min(y.block_begin(block) + (k + 1) * y.group, limit);
    plan.upkeep.push_back({kind, k, begin, std::max(begin, end)});
  };
  const int64_t done = plan.head % y.block / y.group;  // groups of the next block computed so far
  if (plan.crosses) {
    const bool to_next = (plan.head / y.block + 1) % blocks == current;
    for (int64_t k = std::max(first_old, to_next ? done : 0); k < y.groups(); ++k)
      add(UpkeepGroup::ageing, current, k, 0);
  }
  for (int64_t k = plan.crosses ? 0 : done; k < passed; ++k) add(UpkeepGroup::ahead, next, k, 0);
  if (passed != first_old) add(UpkeepGroup::rest, current, passed, offset);
}

}  // namespace

Plan make_plan(const Layout& layout, const StepOptions& options, int64_t head, int64_t fill,
               int64_t n) {
  Plan plan;
  plan.head = plan.next_head = head;
  plan.fill = plan.next_fill = fill;
  if (layout.capacity == 0) return plan;
  plan.window_blocks = blocks_in_window(layout, head, options.window_blocks);
  plan.columns = segments(layout, plan, options.window_blocks,
                          std::max<int64_t>(1, std::min(kRowTile, kColumnTile / layout.m)));
  plan.rows = segments(layout, plan, options.window_blocks, kRowTile);
  for (const Segment& s : plan.rows)
    if (s.in_window) plan.rows_in_window += s.end - s.begin;
  if (options.enqueue) plan_enqueue(layout, options, n, plan);
  plan.next_window_blocks = blocks_in_window(layout, plan.next_head, options.window_blocks);
  return plan;
}

}  // namespace contaccum
