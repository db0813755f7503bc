// The scoring warpgroup of attend_sm90a.cuh.
// - Scores of a tile of bank vectors come as products; with two blocks to a vector, the blocks
//   exchange their shares. Those of the next tile are under way meanwhile.
// - Query side: weights are 2^(score - reference), one reference a local vector. It is raised only
//   where a weight would exceed 2^kRoom, which after the first tiles is rare: until then no thread
//   needs to know another's scores.
// - A thread has two bank vectors and 16 local ones, in the order in which products leave scores:
//   [4 j + 2 h + e] is bank vector my_row() + 8 h, local my_local(j) + e.
#pragma once

#include "attend_sm90a_shared.cuh"
#include "online_softmax.cuh"

namespace contaccum {

template <class S, Side kSide, class T>
class WeighHopper {
  static constexpr bool kQuerySide = kSide != Side::passages;
  using Shared = HopperShared<T>;
  static constexpr int kScores = 32, kMine = 16;
  // Weights at the reference are 2^kShift: a half keeps its bits down to 2^-14 and ends at 2^16.
  static constexpr float kRoom = 8, kShift = weight_shift<S>(kSide);

 public:
  __device__ __forceinline__ WeighHopper(const Args<S>& args, const Ring<S>& r, Shared& shared,
                                         int rank_)
      : a(args),
        ring(r),
        sh(shared),
        rank(rank_),
        split(blockIdx.x / T::kCluster),
        total(kQuerySide ? args.n : args.n * args.m),
        first(blockIdx.y * T::kLocal),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {}

  __device__ __forceinline__ void run() {
    if (thread < T::kLocal) {
      const int64_t l = first + thread;
      sh.local_id[thread] = a.masked() && l < total ? a.local_ids[kQuerySide ? l * a.m : l] : -1;
      sh.reference[0][thread] = sh.reference[1][thread] = minus_infinity<float>();
    }
    sync();
    if constexpr (kQuerySide) {
      const int64_t units = a.blocks * a.parts, splits = gridDim.x / T::kCluster;
      first_unit = int(units * split / splits);
      last_unit = int(units * (split + 1) / splits);
      unit = first_unit - 1;
    }
    float s[kScores] = {}, ahead[kScores] = {};
    barrier_wait(at(sh.locals_ready), 0);
    bool more = wait_tile(0);
    if (more) {
      start_scores(0, s);
      end_scores(s);
      send_scores(0, s);
    }
    int i = 0;
    // Behind the last tile the products run once more, on that tile, and are not used: products
    // that are under way on some paths only would be serialised.
#pragma unroll 1
    for (; more; ++i) {
      const SlotTile t = tile(i);
      const Needed needed = ask(t);
      more = wait_tile(i + 1);
      start_scores(more ? i + 1 : i, ahead);
      receive_scores(i, s);
      claim(i);
      if (kSide != Side::queries && __any_sync(0xffffffffu, t.offsets))
        hand_over(i % 2, Order::add_offsets);
      else
        weigh(i, t, needed, s);
      end_scores(ahead);
#pragma unroll
      for (int x = 0; x < kScores; ++x) s[x] = ahead[x];
      if (kSide != Side::queries) hold(s);  // or products would be serialised
      if (more) send_scores(i + 1, s);
    }
    claim(i);
    hand_over(i % 2, Order::stop);
    if (kQuerySide) {
      close_units(last_unit);
      store_sums();
    }
  }

 private:
  __device__ __forceinline__ void sync() const { named_sync<T::kGroup>(1); }
  __device__ __forceinline__ bool use_offsets() const {
    return kQuerySide ? kSide == Side::queries_with_offsets : a.use_offsets;
  }
  __device__ __forceinline__ int my_row() const { return warp * 16 + lane / 4; }
  __device__ __forceinline__ int my_local(int j) const { return 8 * j + lane % 4 * 2; }

  // --- scores ---

  // Read by the lane that also arrives at the barriers behind which the next tile is written.
  __device__ __forceinline__ SlotTile tile(int i) const {
    return from_first_lane(lane == 0 ? sh.slots[i % T::kStages] : SlotTile{});
  }

  // False if there is no tile i.
  __device__ __forceinline__ bool wait_tile(int i) const {
    barrier_wait(at(sh.full[i % T::kStages]), i / T::kStages & 1);
    return __any_sync(0xffffffffu, lane == 0 && sh.slots[i % T::kStages].count > 0);
  }

  __device__ __forceinline__ Needed ask(const SlotTile& t) const {
    Needed p{};
    if (t.offsets) return p;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = min(my_row() + 8 * h, t.count - 1);
      if constexpr (!kQuerySide) p.lse[h] = (t.local ? a.local_lse : a.row_lse)[t.slot + r];
      if (a.masked())
        p.id[h] =
            (t.local ? a.local_ids : a.ids)[int64_t(t.slot + r) * a.m + (kQuerySide ? t.kind : 0)];
    }
    if (kSide == Side::queries || t.offset < 0) return p;
    const float* bias = (kQuerySide ? a.query_bias : a.passage_bias) + first +
                        int64_t(t.offset) * padded_locals(total);
#pragma unroll
    for (int j = 0; j < 8; ++j) p.bias[j] = *reinterpret_cast<const float2*>(bias + my_local(j));
    return p;
  }

  // The block's share of the scores of tile i: bank x local vectors, over its elements of d.
  __device__ __forceinline__ void start_scores(int i, float (&s)[kScores]) {
    hold(s);
    products_begin();
    const uint64_t bank = matrix_at(shared_address(sh.tile[i % T::kStages]));
    const uint64_t locals = matrix_at(shared_address(sh.local));
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c)
#pragma unroll
      for (int k = 0; k < kBoxColumns / 16; ++k) {
        const int step = (c * T::kBoxBytes + k * 32) >> 4;  // 16 elements along the rows
        product<S, false>(s, bank + step, locals + step, c + k > 0);
      }
    products_commit();
  }
  __device__ __forceinline__ void end_scores(float (&s)[kScores]) {
    products_wait<0>();
    hold(s);
  }
  // To the thread of the same place in the other block: the sums are the same bits in both.
  __device__ __forceinline__ void send_scores(int i, const float (&s)[kScores]) {
    if constexpr (T::kCluster == 2) {
      if (i > 0) barrier_wait(at(sh.partial_empty), (i - 1) & 1);
      const uint32_t barrier = shared_of(at(sh.partial_full), rank ^ 1);
#pragma unroll
      for (int q = 0; q < kScores / 4; ++q)
        store_there(shared_of(at(sh.partial[q][thread]), rank ^ 1), s[4 * q], s[4 * q + 1],
                    s[4 * q + 2], s[4 * q + 3], barrier);
    }
  }
  __device__ __forceinline__ void receive_scores(int i, float (&s)[kScores]) {
    if constexpr (T::kCluster == 2) {
      if (thread == 0) barrier_expect(at(sh.partial_full), sizeof(sh.partial));
      barrier_wait(at(sh.partial_full), i & 1);
#pragma unroll
      for (int q = 0; q < kScores / 4; ++q) {
        const float4 other = sh.partial[q][thread];
        s[4 * q] += other.x;
        s[4 * q + 1] += other.y;
        s[4 * q + 2] += other.z;
        s[4 * q + 3] += other.w;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive_there(shared_of(at(sh.partial_empty), rank ^ 1));
    }
  }

  // --- weights ---

  // The buffer of weights that tile i will fill.
  __device__ __forceinline__ void claim(int i) {
    if (i >= 2) barrier_wait(at(sh.weights_empty[i % 2]), (i / 2 - 1) & 1);
  }

  // Tile i: scores to weights, into the buffer that the summing warps read next.
  __device__ __forceinline__ void weigh(int i, const SlotTile& t, const Needed& p,
                                        float (&s)[kScores]) {
    const int buffer = i % 2;
    bool raised = false;
    float scale = a.scale * kLog2e, w[kScores];
    if (kQuerySide && __any_sync(0xffffffffu, t.unit != unit)) close_units(t.unit);
    if (a.masked() || __any_sync(0xffffffffu, t.local || t.count < kBoxRows)) leave_out(t, p, s);
    if constexpr (kQuerySide) {
      raised = exponentiate(t, p, s, scale, w, buffer);
      unit_in_loss = t.in_loss;
    } else {
      const float top[2] = {p.lse[0] * kLog2e - kShift, p.lse[1] * kLog2e - kShift};
      add_bias(s, scale, p);
#pragma unroll
      for (int x = 0; x < kScores; ++x) w[x] = exp2_(s[x] - top[x / 2 % 2]);
    }
    if (t.local) drop_targets(t, w);
    if (t.in_loss && a.with_grad) store_weights(buffer, w);
    hand_over(buffer, !t.in_loss || !a.with_grad ? Order::skip
                      : raised                   ? Order::rescale_and_add
                                                 : Order::add);
  }
  // Products are all that reads weights: four lanes come for their warp, those that may have set
  // `shrink`. Where others fill a buffer that every lane has written, every lane comes, or
  // racecheck could not follow.
  __device__ __forceinline__ void hand_over(int buffer, Order order) {
    if (thread == 0) sh.order[buffer] = order;
    fence_for_products();
    const uint32_t full = at(sh.weights_full[buffer]);
    if (order == Order::add_offsets) return barrier_arrive(full);
    __syncwarp();
    if (lane < 4) barrier_arrive<8>(full);
  }

  // Query side: weights, and what they add to the sums. True if the loss's references had to be
  // raised. The table is without offsets. A tile has one, so its weights with and without it differ
  // by a factor, unless what is left with it is too small for that: then the table is summed apart.
  __device__ __forceinline__ bool exponentiate(const SlotTile& t, const Needed& p,
                                               float (&s)[kScores], float scale,
                                               float (&w)[kScores], int buffer) {
    const bool biased = use_offsets() && t.offset >= 0;
    bool far = biased && t.for_table && p.is_far(), apart = use_offsets() && !t.in_loss,
         raised = false;
    relate(0, s, scale, p, w);
    if (named_any<T::kGroup>(1, far || apart || is_too_large(w))) {
      if constexpr (kSide == Side::queries) {
        raised = raise(0, s, scale, p, w, buffer);
      } else {
        far = named_any<T::kGroup>(1, far);
        apart |= far;
#pragma unroll 1  // one copy of the code for both
        for (int which = apart; which >= (t.in_loss ? 0 : 1); --which) {
          const Needed with = which == 0 ? p : Needed{};
          raised = raise(which, s, scale, with, w, buffer);
          if (which == 1) sum_for_table(w);
        }
      }
    }
    if (apart && !t.in_loss) return false;
#pragma unroll
    for (int x = 0; x < kScores; ++x) w[x] = exp2_(w[x]);
    if constexpr (kSide == Side::queries) {
      accumulate(w, unit_sum);
      return raised;
    }
    accumulate(w, biased_sum);
    if (!t.for_table || far) return raised;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      unit_sum[2 * j] += (w[4 * j] + w[4 * j + 2]) * exp2_(-p.bias[j].x);
      unit_sum[2 * j + 1] += (w[4 * j + 1] + w[4 * j + 3]) * exp2_(-p.bias[j].y);
    }
    return raised;
  }
  // Into the unit's sum, with references of its own.
  __device__ __forceinline__ void sum_for_table(const float (&w)[kScores]) {
    float x[kScores], sums[kMine] = {};
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = exp2_(w[i]);
    accumulate(x, sums);
    const float sum = sum_columns(sums);
    add_to_unit(sh.reference[1][thread % T::kLocal], sum);
  }
  __device__ __forceinline__ static void add_bias(float (&s)[kScores], float scale,
                                                  const Needed& p) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[4 * j + 2 * h] = s[4 * j + 2 * h] * scale + p.bias[j].x;
        s[4 * j + 2 * h + 1] = s[4 * j + 2 * h + 1] * scale + p.bias[j].y;
      }
  }

  // No score where there is no vector or a false negative: the column holds the same passage as the
  // row's positive and is not it.
  __device__ __forceinline__ void leave_out(const SlotTile& t, const Needed& p,
                                            float (&s)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = my_row() + 8 * h, own = t.local ? target(t, r) : -1;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int l = my_local(j) + e;
          bool out = r >= t.count;
          if (a.masked()) {
            const int64_t mine = sh.local_id[l];
            out |= mine == p.id[h] && mine != -1 && l != own;
          }
          if (out) s[4 * j + 2 * h + e] = minus_infinity<float>();
        }
    }
  }
  // The local vector of this block that row r of a local tile is the target of, or has as its own.
  __device__ __forceinline__ int target(const SlotTile& t, int r) const {
    if constexpr (kQuerySide) return t.kind == 0 ? t.slot + r - first : -1;
    return (t.slot + r) * a.m - first;
  }
  // The target is in the sums, not in the products: see reduce.cuh.
  __device__ __forceinline__ void drop_targets(const SlotTile& t, float (&w)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = target(t, my_row() + 8 * h);
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (my_local(j) + e == own) w[4 * j + 2 * h + e] = 0;
    }
  }

  // sums: of the thread's locals, over its bank vectors.
  __device__ __forceinline__ static void accumulate(const float (&w)[kScores],
                                                    float (&sums)[kMine]) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[2 * j + e] += w[4 * j + e] + w[4 * j + 2 + e];
  }

  // Scores relative to the references: of the loss (0) or of the table (1).
  __device__ __forceinline__ void relate(int which, const float (&s)[kScores], float scale,
                                         const Needed& p, float (&x)[kScores]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 top = *reinterpret_cast<const float2*>(&sh.reference[which][my_local(j)]);
      // -inf minus -inf would be NaN
      top = {fmaxf(top.x, -1e30f) - p.bias[j].x, fmaxf(top.y, -1e30f) - p.bias[j].y};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x[4 * j + 2 * h] = s[4 * j + 2 * h] * scale - top.x;
        x[4 * j + 2 * h + 1] = s[4 * j + 2 * h + 1] * scale - top.y;
      }
    }
  }
  __device__ __forceinline__ static bool is_too_large(const float (&w)[kScores]) {
    float most[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      most[j] = fmaxf(fmaxf(w[4 * j], w[4 * j + 1]), fmaxf(w[4 * j + 2], w[4 * j + 3]));
    return fmaxf(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])),
                 fmaxf(fmaxf(most[4], most[5]), fmaxf(most[6], most[7]))) > kShift + kRoom;
  }
  // Scores relative to references that no weight exceeds too far. True if those had to be raised,
  // with all sums that hang on them.
  __device__ __forceinline__ bool raise(int which, const float (&s)[kScores], float scale,
                                        const Needed& p, float (&w)[kScores], int buffer) {
    relate(which, s, scale, p, w);
    if (!named_any<T::kGroup>(1, is_too_large(w))) return false;
    raise_references(which, s, scale, p, buffer);
    relate(which, s, scale, p, w);
    return true;
  }
  __device__ __forceinline__ void raise_references(int which, const float (&s)[kScores],
                                                   float scale, const Needed& p, int buffer) {
    float top[kMine];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float bias = e == 0 ? p.bias[j].x : p.bias[j].y;
        float most = fmaxf(s[4 * j + e], s[4 * j + 2 + e]) * scale + bias;
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2)
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, bit));
        if (lane < 4) sh.column[warp][my_local(j) + e] = most;
      }
    sync();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int l = my_local(j) + e;
        const float before = sh.reference[which][l];
        float most = before + kShift;
#pragma unroll
        for (int w = 0; w < 4; ++w) most = fmaxf(most, sh.column[w][l]);
        top[2 * j + e] = most - kShift;
        const float factor = before == top[2 * j + e] ? 1.f : exp2_(before - top[2 * j + e]);
        if (which == 0) unit_sum[2 * j + e] *= factor;
        if (which == 0 && use_offsets()) biased_sum[2 * j + e] *= factor;
        if (which == 0 && warp == 0 && lane < 4) sh.shrink[buffer][l] = factor;
      }
    sync();  // all have read the references that now change
    if (which == 0 && thread < T::kLocal) loss_sum *= sh.shrink[buffer][thread];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (warp == 0 && lane < 4) sh.reference[which][my_local(j) + e] = top[2 * j + e];
    sync();
  }

  __device__ __forceinline__ void store_weights(int buffer, const float (&w)[kScores]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = my_row() + 8 * h;
      char* row = sh.weight[buffer] + r * 128 + lane % 4 * 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = w[4 * j + 2 * h], y = w[4 * j + 2 * h + 1];
        // 16-byte units, swizzled as matrix_at() says.
        void* to = row + ((j ^ (r & 7)) << 4);
        if constexpr (std::is_same_v<S, Bf16>)
          *static_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
        else
          *static_cast<__half2*>(to) = __floats2half2_rn(x, y);
      }
    }
  }

  // --- sums ---

  // Sums over all bank vectors; the first threads get that of local vector `thread`.
  __device__ __forceinline__ float sum_columns(const float (&mine)[kMine]) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float whole = mine[2 * j + e];
#pragma unroll
        for (int bit = 4; bit < 32; bit *= 2) whole += __shfl_xor_sync(0xffffffffu, whole, bit);
        if (lane < 4) sh.column[warp][my_local(j) + e] = whole;
      }
    sync();
    float whole = 0;
    if (thread < T::kLocal)
#pragma unroll
      for (int w = 0; w < 4; ++w) whole += sh.column[w][thread];
    sync();
    return whole;
  }
  // Whether the thread stores what both blocks know, for local vector `thread`.
  __device__ __forceinline__ bool stores() const {
    return rank == 0 && thread < T::kLocal && first + thread < total;
  }

  // Table entries of units [unit, end): the first is what has been summed, the others are empty.
  // Before the first unit come the local vectors, which have no entry.
  __device__ __forceinline__ void close_units(int end) {
    float whole = sum_columns(unit_sum), top = sh.reference[0][thread % T::kLocal];
    if (use_offsets()) {
      add_to_unit(top, whole);
      whole = unit_part;
      top = unit_max;
    } else if (unit_in_loss) {
      loss_sum += whole;
    }
    if (a.incremental) {
      const float lse = whole == 0 ? minus_infinity<float>() : (top + log2f(whole)) * kLn2;
      for (int u = max(unit, first_unit); u < end; ++u)
        if (stores())
          a.unit_lse[int64_t(u) * a.n + first + thread] = u == unit ? lse : minus_infinity<float>();
    }
#pragma unroll
    for (int x = 0; x < kMine; ++x) unit_sum[x] = 0;
    unit_part = 0;
    unit_max = minus_infinity<float>();
    unit = end;
  }
  // With offsets: a sum relative to 2^top.
  __device__ __forceinline__ void add_to_unit(float top, float sum) {
    if (sum == 0) return;
    const float both = fmaxf(unit_max, top);
    unit_part = unit_part * exp2_(unit_max - both) + sum * exp2_(top - both);
    unit_max = both;
  }

  __device__ __forceinline__ void store_sums() {
    if (use_offsets()) loss_sum = sum_columns(biased_sum);
    if (!stores()) return;
    const int64_t to = int64_t(split) * total + first + thread;
    a.part_max[to] = sh.reference[0][thread] * kLn2;
    a.part_sum[to] = loss_sum;
  }

  const Args<S>& a;
  const Ring<S>& ring;
  Shared& sh;
  const int rank, split, total, first;
  const int thread, lane, warp;  // of the warpgroup
  int first_unit = 0, last_unit = 0, unit = 0;
  bool unit_in_loss = false;
  // By local vector, over the thread's bank vectors: of the unit, without offsets; of all, with
  // them.
  float unit_sum[kMine] = {}, biased_sum[kMine] = {};
  // Of local vector `thread`: with offsets, what of the unit is relative to 2^unit_max instead of
  // the loss's references; the sum over all bank vectors.
  float unit_part = 0, unit_max = minus_infinity<float>(), loss_sum = 0;
};

}  // namespace contaccum
