// Which columns the table's upkeep scores for every banked row in one step: plan_enqueue() in
// csrc/cpu/plan.cpp as a list that any thread can read from anywhere.
#pragma once

#include "ring.cuh"

namespace contaccum {

// Slots [begin, end), at most a group; perhaps none.
struct UpkeepItem {
  int begin, end;
  int group;  // row of group_lse; -1: the rest of the group that head divides, for kOldLse
};

// Item 0 is the rest. Then groups of the block that head has entered, ahead of it; then groups of
// the block after it, as many as head has passed.
template <class S>
class Upkeep {
 public:
  __device__ explicit Upkeep(const Ring<S>& r) : ring(r), next(r.after()) {
    const bool crosses = ring.crosses();
    const int done = ring.passed_groups();
    const int first = max(next.first_old(), ring.next_block() == next.block() ? done : 0);
    first_entered = first;
    entered = crosses ? max(0, ring.a.groups - first) : 0;
    first_ahead = crosses ? 0 : done;
    ahead = max(0, next.passed_groups() - first_ahead);
  }

  __device__ int count() const { return 1 + entered + ahead; }

  __device__ UpkeepItem item(int i) const {
    if (i == 0) return rest();
    const bool in_entered = i <= entered;
    const int b = in_entered ? next.block() : next.next_block();
    const int k = in_entered ? first_entered + i - 1 : first_ahead + i - 1 - entered;
    const int end = min(ring.block_end(b), ring.fill), begin = b * ring.a.block + k * ring.a.group;
    return {min(begin, end), min(begin + ring.a.group, end), k};
  }

 private:
  __device__ UpkeepItem rest() const {
    const int b = next.block(), passed = next.passed_groups();
    if (passed == next.first_old()) return {0, 0, -1};
    const int limit = min(ring.block_end(b), ring.fill);
    const int end = min(b * ring.a.block + (passed + 1) * ring.a.group, limit);
    return {min(next.head, end), end, -1};
  }

  const Ring<S>& ring;
  const Ring<S> next;
  int first_entered, entered, first_ahead, ahead;
};

}  // namespace contaccum
