// The scoring warpgroup of attend_sm90a.cuh.
// - Scores of a tile of bank vectors come as products; with two blocks to a vector, the blocks
//   exchange their shares. Those of the next tile are under way meanwhile.
// - Query side: weights are 2^(score - reference), one reference a local vector. It is raised only
//   where a weight would exceed 2^kRoom, which after the first tiles is rare: until then no thread
//   needs to know another's scores.
// - Tiles of one unit and offset after each other are a stretch: the references of the loss are
//   kept less the offset's bias, so that a tile costs what it does without. Sums are taken where it
//   ends.
// - Behind the tiles of a few offsets comes a tile of those offsets, which is not scored: its
//   weights are the sums of their stretches.
// - A thread has two bank vectors and 16 local ones, in the order in which products leave scores:
//   [4 j + 2 h + e] is bank vector my_row() + 8 h, local my_local(j) + e.
#pragma once

#include "online_softmax.cuh"
#include "scores_sm90a.cuh"

namespace contaccum {

template <class S, Side kSide, class T>
class WeighHopper {
  static constexpr bool kQuerySide = is_query_side(kSide), kOffsets = has_offsets(kSide);
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
        scores(shared, rank_),
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
      sh.reference[0][thread] = kQuerySide ? minus_infinity<float>() : 0.f;
      sh.reference[1][thread] = minus_infinity<float>();
    }
    sync();
    if constexpr (kQuerySide) {
      const int64_t units = a.blocks * a.parts, splits = gridDim.x / T::kCluster;
      first_unit = int(units * split / splits);
      last_unit = int(units * (split + 1) / splits);
      unit = first_unit - 1;
    }
    barrier_wait(at(sh.locals_ready), 0);
    if (starts_early(kSide)) wait_for_predecessor();  // for biases, and flags of thread 0
    float s[kScores] = {}, ahead[kScores] = {};
    int i = 0, exchange = 0;  // tiles, and those of them that are scored
    bool more = scores.wait_slots(0);
    do {
      if (more) {
        scores.start(i, s);
        scores.end(s);
        scores.send(exchange, s);
      }
      // Behind the last tile the products run once more, on that tile, and are not used: products
      // that are under way on some paths only would be serialised.
#pragma unroll 1
      for (; more; ++i) {
        const SlotTile t = scores.tile(i);
        const Needed needed = ask(t);
        more = scores.wait_slots(i + 1);
        scores.start(more ? i + 1 : i, ahead);
        scores.receive(exchange++, s);
        claim(i);
        weigh(t, needed, s, i % 2);
        scores.end(ahead);
#pragma unroll
        for (int x = 0; x < kScores; ++x) s[x] = ahead[x];
        // Or products would be serialised; with two blocks it would delay what is sent.
        if (kOffsets && T::kCluster == 1) hold(s);
        if (more) scores.send(exchange, s);
      }
      if (kOffsets) {
        end_stretch();
        more = weigh_offsets(i);
      }
    } while (kOffsets && more);
    claim(i);
    if (kQuerySide && !kOffsets) end_stretch();
    if (kQuerySide && kOffsets && thread < T::kLocal) sh.reference[0][thread] = reference;
    hand_over(i % 2, Order::stop);
    if (kQuerySide) {
      close_units(last_unit);
      store_sums();
    }
  }

 private:
  __device__ __forceinline__ void sync() const { named_sync<T::kGroup>(1); }
  // Whether x, which is the same in a warp and true of few tiles.
  __device__ __forceinline__ static bool seldom(bool x) {
    return __builtin_expect(__any_sync(0xffffffffu, x), false);
  }
  __device__ __forceinline__ int my_row() const { return warp * 16 + lane / 4; }
  __device__ __forceinline__ int my_local(int j) const { return 8 * j + lane % 4 * 2; }

  __device__ __forceinline__ Needed ask(const SlotTile& t) const {
    Needed p{};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = min(my_row() + 8 * h, t.count - 1);
      if constexpr (!kQuerySide) p.lse[h] = (t.local ? a.local_lse : a.row_lse)[t.slot + r];
      if (a.masked())
        p.id[h] =
            (t.local ? a.local_ids : a.ids)[int64_t(t.slot + r) * a.m + (kQuerySide ? t.kind : 0)];
    }
    if (kOffsets && t.offset >= 0 && t.offset != offset && thread < T::kLocal)
      p.bias =
          (kQuerySide ? a.query_bias
                      : a.passage_bias)[int64_t(t.offset) * padded_locals(total) + first + thread];
    return p;
  }

  // --- weights ---

  // The buffer of weights that tile i will fill.
  __device__ __forceinline__ void claim(int i) {
    if (i >= 2) barrier_wait(at(sh.weights_empty[i % 2]), (i / 2 - 1) & 1);
  }

  // Scores to weights, into the buffer that the summing warps read next.
  __device__ __forceinline__ void weigh(const SlotTile& t, const Needed& p, float (&s)[kScores],
                                        int buffer) {
    bool raised = false;
    const float scale = a.scale * kLog2e;
    float w[kScores];
    if constexpr (kOffsets || kQuerySide)
      if (seldom(begins_stretch(t))) begin_stretch(t, p.bias);
    if (a.masked() || seldom(t.local || t.count < kBoxRows)) leave_out(t, p, s);
    if constexpr (kQuerySide) {
      raised = exponentiate(t, s, scale, w, buffer);
    } else {
      const float top[2] = {p.lse[0] * kLog2e - kShift, p.lse[1] * kLog2e - kShift};
      exponentiate_for_rows(s, scale, top, w);
      if (kOffsets) accumulate(w, sums);
    }
    if (seldom(t.local)) drop_targets(t, w);
    if (t.in_loss && a.with_grad) store_weights(buffer, w);
    hand_over(buffer, !t.in_loss || !a.with_grad ? Order::skip
                      : raised                   ? Order::rescale_and_add
                                                 : Order::add);
  }
  // Products are all that reads weights: four lanes come for their warp, those that may have set
  // `shrink`. Behind the last tile references are read that every lane may have written, and every
  // lane comes, or racecheck could not follow.
  __device__ __forceinline__ void hand_over(int buffer, Order order) {
    if (thread == 0) sh.order[buffer] = order;
    fence_for_products();
    if (kQuerySide && kOffsets && order == Order::stop)
      return barrier_arrive(at(sh.weights_full[buffer]));
    __syncwarp();
    if (lane < 4) barrier_arrive<8>(at(sh.weights_full[buffer]));
  }

  // Query side: weights, and what they add to the sums. True if references had to be raised. The
  // table is without offsets: its sums are the loss's, with the references as they are less the
  // bias, unless what is left with the offset is too small for that. Then they are taken apart.
  __device__ __forceinline__ bool exponentiate(const SlotTile& t, const float (&s)[kScores],
                                               float scale, float (&w)[kScores], int buffer) {
    const bool apart = kOffsets && far && t.for_table;
    bool raised = false;
    relate(references, s, scale, w);
    if (__builtin_expect(named_any<T::kGroup>(1, apart || is_too_large(w)), false)) {
      if (apart) {
        raise(1, s, scale, w, buffer);
        sum_for_table(w);
      }
      raised = raise(references, s, scale, w, buffer);
    }
#pragma unroll
    for (int x = 0; x < kScores; ++x) w[x] = exp2_(w[x]);
    accumulate(w, sums);
    return raised;
  }
  // Into the unit's sum, with references of its own.
  __device__ __forceinline__ void sum_for_table(const float (&w)[kScores]) {
    float x[kScores], of_tile[kMine] = {};
#pragma unroll
    for (int i = 0; i < kScores; ++i) x[i] = exp2_(w[i]);
    accumulate(x, of_tile);
    const float sum = sum_columns(of_tile);
    add_to_unit(sh.reference[1][thread % T::kLocal], sum);
  }
  // Passage side.
  __device__ __forceinline__ void exponentiate_for_rows(const float (&s)[kScores], float scale,
                                                        const float (&top)[2],
                                                        float (&w)[kScores]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 bias{0, 0};
      if (kOffsets) bias = *reinterpret_cast<const float2*>(&sh.reference[0][my_local(j)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        w[4 * j + 2 * h] = exp2_(s[4 * j + 2 * h] * scale + (bias.x - top[h]));
        w[4 * j + 2 * h + 1] = exp2_(s[4 * j + 2 * h + 1] * scale + (bias.y - top[h]));
      }
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

  // Scores relative to the references: of the loss (0), or of what is for the table alone (1).
  __device__ __forceinline__ void relate(int which, const float (&s)[kScores], float scale,
                                         float (&x)[kScores]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 top = *reinterpret_cast<const float2*>(&sh.reference[which][my_local(j)]);
      top = {fmaxf(top.x, -1e30f), fmaxf(top.y, -1e30f)};  // -inf minus -inf would be NaN
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
                                        float (&w)[kScores], int buffer) {
    relate(which, s, scale, w);
    if (!named_any<T::kGroup>(1, is_too_large(w))) return false;
    raise_references(which, s, scale, buffer);
    relate(which, s, scale, w);
    return true;
  }
  __device__ __forceinline__ void raise_references(int which, const float (&s)[kScores],
                                                   float scale, int buffer) {
    float top[kMine];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float most = fmaxf(s[4 * j + e], s[4 * j + 2 + e]) * scale;
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
        if (which == references) sums[2 * j + e] *= factor;
        if (which == 0 && warp == 0 && lane < 4) sh.shrink[buffer][l] = factor;
      }
    sync();  // all have read the references that now change
    if (which == 0 && thread < T::kLocal) {
      const float factor = sh.shrink[buffer][thread];
      loss_sum *= factor;
#pragma unroll
      for (int x = 0; x < kOffsetsAtOnce; ++x) mass[x] *= factor;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (warp == 0 && lane < 4) sh.reference[which][my_local(j) + e] = top[2 * j + e];
    sync();
    if (kOffsets && which == 0 && thread < T::kLocal) reference = sh.reference[0][thread] + bias;
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

  // Sums over all bank vectors; the first threads get that of local vector `thread`. All must meet
  // before the next time.
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
    return whole;
  }
  // Whether the thread stores what both blocks know, for local vector `thread`.
  __device__ __forceinline__ bool stores() const {
    return rank == 0 && thread < T::kLocal && first + thread < total;
  }

  // --- stretches of tiles with one unit and one offset ---

  __device__ __forceinline__ bool begins_stretch(const SlotTile& t) const {
    return (kOffsets && t.offset != offset) ||
           (kQuerySide && (t.unit != unit || t.in_loss == (references > 0)));
  }
  // Ends the one before it, which all have reached.
  __device__ __forceinline__ void begin_stretch(const SlotTile& t, float new_bias) {
    constexpr float kSafe = 32;
    end_stretch();
    references = t.in_loss ? 0 : 1;
    if (kQuerySide && __any_sync(0xffffffffu, t.unit != unit)) close_units(t.unit);
    if (!kOffsets || t.offset == offset) return;  // no bias has been asked for
    offset = t.offset;
    if (offset >= 0 && offset != last_offset) {
      last_offset = offset;
      ++offsets;
    }
    bias = new_bias;
    if (thread < T::kLocal) sh.reference[0][thread] = kQuerySide ? reference - bias : bias;
    if (kQuerySide)
      far = named_any<T::kGroup>(1, thread < T::kLocal && !(bias > -kSafe));
    else
      sync();
  }
  __device__ __forceinline__ void end_stretch() {
    const float whole = sum_columns(sums);
    if (references == 0) loss_sum += whole;
    // What is left of a far one is too little to go into the table.
    if (kQuerySide && !far && thread < T::kLocal)
      add_to_unit(sh.reference[references][thread], whole);
#pragma unroll
    for (int x = 0; x < kOffsetsAtOnce; ++x)
      if (kOffsets && offset >= 0 && x == offsets - 1) mass[x] += whole;
#pragma unroll
    for (int x = 0; x < kMine; ++x) sums[x] = 0;
  }
  // The offsets of the stretches since the last ones, if tile i is they; whether slots follow.
  __device__ __forceinline__ bool weigh_offsets(int& i) {
    const SlotTile t = scores.tile(i);
    if (t.count == 0) return false;
    claim(i);
    if (thread < T::kLocal)
#pragma unroll
      for (int x = 0; x < kOffsetsAtOnce; ++x) {
        char* to = sh.weight[i % 2] + x * 128 + ((thread / 8 ^ x) << 4) + thread % 8 * 2;
        *reinterpret_cast<Bf16*>(to) = __float2bfloat16(mass[x]);
        *reinterpret_cast<Bf16*>(to + kOffsetsAtOnce * 128) = __float2bfloat16(0.f);
        mass[x] = 0;
      }
    static_assert(kOffsetRows == 2 * kOffsetsAtOnce, "rows behind the masses are zeros");
    hand_over(i % 2, Order::add_offsets);
    offsets = 0;
    sync();
    return scores.wait_slots(++i);
  }

  // Table entries of units [unit, end): the first is what has been summed, the others are empty.
  // Before the first unit come the local vectors, which have no entry.
  __device__ __forceinline__ void close_units(int end) {
    if (a.incremental) {
      const float lse =
          unit_sum == 0 ? minus_infinity<float>() : (unit_max + log2f(unit_sum)) * kLn2;
      for (int u = max(unit, first_unit); u < end; ++u)
        if (stores())
          a.unit_lse[int64_t(u) * a.n + first + thread] = u == unit ? lse : minus_infinity<float>();
    }
    unit_sum = 0;
    unit_max = minus_infinity<float>();
    unit = end;
  }
  // A sum relative to 2^top.
  __device__ __forceinline__ void add_to_unit(float top, float sum) {
    if (sum == 0) return;
    const float both = fmaxf(unit_max, top);
    unit_sum = unit_sum * exp2_(unit_max - both) + sum * exp2_(top - both);
    unit_max = both;
  }

  __device__ __forceinline__ void store_sums() {
    if (!stores()) return;
    const int64_t to = int64_t(split) * total + first + thread;
    a.part_max[to] = sh.reference[0][thread] * kLn2;
    a.part_sum[to] = loss_sum;
  }

  const Args<S>& a;
  const Ring<S>& ring;
  Shared& sh;
  TileScores<S, T, kOffsets> scores;
  const int rank, split, total, first;
  const int thread, lane, warp;  // of the warpgroup
  int first_unit = 0, last_unit = 0, unit = 0;
  int references = 0;      // that the stretch takes
  float sums[kMine] = {};  // of the stretch by local vector, over the thread's bank vectors
  // Of local vector `thread`: over all bank vectors; of the unit, relative to 2^unit_max.
  float loss_sum = 0, unit_sum = 0, unit_max = minus_infinity<float>();
  // The stretch: its offset; whether its weights may be too small to tell those without offset; for
  // local vector `thread` its bias, and the reference with it.
  int offset = -1;
  bool far = false;
  float bias = 0, reference = minus_infinity<float>();
  // For local vector `thread`, masses of the offsets since the last tile of offsets; how many these
  // are, and the last.
  float mass[kOffsetsAtOnce] = {};
  int offsets = 0, last_offset = -1;
};

}  // namespace contaccum
