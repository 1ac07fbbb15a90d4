// SPDX-License-Identifier: Apache-2.0
// Warps 1 and 2 of the SM90 product's loading warpgroup, and 3 of some kernels: tokens, the tables
// of their tasks, and scales that change along K. (Warp 0: sm90/weight_loader.h.)
//
// Rows are gathered in 16-byte pieces, eight threads to a row. Rows behind the tile's last are not
// read: what lies there spoils only columns that nobody stores.
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm90/ring.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class TokenLoader {
 public:
  __device__ TokenLoader(const Params& p, const SharedMemory<S>& shared) : p_(p), shared_(shared) {}

  __device__ void run() {
    // What the lists say of the first task is asked before the wait, where they are old enough: two
    // trips to memory less between the end of the kernel in front and the first product.
    if (!p_.settled) begin_kernel();
    const std::uint32_t rank = S::kPair == 2 ? ptx::cluster_rank() : 0;
    Schedule<S::kTokens * S::kPair, S::kPair, kWalk<S>, S::kTiles, S::kOrder, S::kDeal> schedule(
        p_, dealt_ring<S>(p_, shared_));
    Task task = part_of<S::kPair>(schedule.next(), rank);
    fetch_slots(task);
    // The first task's table is written before the wait, too, where it needs nothing that the
    // kernel in front makes.
    bool early = S::kSmall && p_.settled && p_.row_weights == nullptr &&
                 (kLateFactor || p_.a_scale == nullptr || block_scales());
    int term_place = 0;  // of the next task that has products, as the weights' warp counts them
    if (p_.settled && !early) begin_kernel();
    for (int ring = 0;; ring = ring == S::kRing - 1 ? 0 : ring + 1) {
      // With its first stage free, its place in the ring is, too.
      ptx::barrier_wait(shared_.empty(cursor_.stage), cursor_.round ^ 1);
      prepare(task, shared_.table(ring));
      if constexpr (S::kBringsTerms)
        term_place = bring_terms(task.expert, task.weight_task, term_place);
      if (early) {
        early = false;
        if constexpr (kLateFactor) ask_for_factor();
        begin_kernel();
      }
      if constexpr (kLateFactor) copy_token_scale(shared_.table(ring));
      // All that is left to know: registers are scarce here, too.
      const Load load{task.expert >= 0 ? task.rows : 0, stages_of<S>(p_, task),
                      static_cast<int>(task.first)};
      const Run run{task.expert, task.weight_task, loaded_run<S>(task)};
      const bool last = task.expert == kEndOfTasks;
      // The next task is looked up behind this one's first stage (in front of it, where there is no
      // other), so that its slots are on their way while the rest is loaded; but behind all of them
      // in kernels for a counter, which has answered by then. (To choose between both, where lists
      // have no counter, cost the others more than these gained: log_sm90.md, tenth round.)
      const bool others = S::kHasRuns && ((S::kSmall && load.stages > 1) || run.length > 1);
      for (int part = 0, r = 0, from = 0; r < run.length; ++part) {
        if (S::kDeal == Deal::kInTurn && !last && part == (others ? 1 : 0)) {
          task = part_of<S::kPair>(schedule.next(), rank);
          fetch_slots(task);
        }
        const int to = S::kSmall && others && part == 0 ? 1 : load.stages;
        load_stages(load, from, to);
        from = to;
        if (to == load.stages) {
          from = 0;
          if (++r < run.length) {
            find_weight_scale(run.expert, run.weight_task + r);
            if constexpr (S::kBringsTerms)
              term_place = bring_terms(run.expert, run.weight_task + r, term_place);
          }
        }
      }
      if (last) return;
      if constexpr (S::kDeal == Deal::kByCounter) {
        task = part_of<S::kPair>(schedule.next(), rank);
        fetch_slots(task);
      }
    }
  }

 private:
  static constexpr std::uint32_t kNone = 0xffffffffu;
  // Lane l of warp w looks after rows l % 4 + 4w of passes l / 4 (+ 8): those that its own warp
  // loads.
  static constexpr int kEntries = (S::kPassRoom * 4 + 31) / 32;
  // The rows' offsets stay in registers through all stages: two instructions a copy. Where the
  // multiplying warps need nearly all registers they come from shared memory each time (and rows by
  // TMA as a rule).
  static constexpr bool kInRegisters = !(S::kHasBlockScales && S::kBlocks == 2);
  // A caller's blocks taken as tiles have padding in them, 15 rows of 16 where tokens are few: it
  // is not read at all. (As row 0 it was, by every CTA at the same time: 3 us of a product at T
  // = 1.)
  static constexpr bool kSkipsPadding = S::kTiles != Tiles::kListed;
  // Factors of rows are copied like the first stage's tokens, and have landed with it: with so few
  // tasks a trip to memory in front of the first one shows. (But in int4 the code cost a layer 2%.)
  static constexpr bool kCopiesFactors = S::kTiles == Tiles::kFromIdsOrBlocks;
  // With a list in e4m3 a token's scale is copied like that behind the wait for the kernel in
  // front, which may have made it.
  static constexpr bool kLateFactor = S::kBringsTerms && !kCopiesFactors;
  static constexpr bool kPadded =
      !kSkipsPadding && (!kInRegisters || S::kHasBlockScales);  // rows has no kNone
  static constexpr bool kKeepsThread = S::kSmall && S::kWarpgroups == 1;
  __device__ static int thread() { return thread_index<kKeepsThread>(); }
  __device__ static int me() { return thread() - 32; }
  struct Load {
    int rows, stages, first;
  };
  struct Run {
    int expert, weight_task, length;
  };
  __device__ int pass_of(int entry) const { return (me() % 32 + entry * 32) / 4; }
  __device__ int row_in_pass() const { return me() / 32 * 4 + me() % 4; }
  __device__ bool block_scales() const { return S::kHasBlockScales && p_.block_scaled; }

  // Whether tasks have a mask of slots: see Schedule::make_tiles.
  __device__ bool has_mask() const {
    return S::kTiles != Tiles::kListed && p_.unlisted.ids != nullptr;
  }
  // The slot of the task's row `token`, of which it may have fewer.
  __device__ static std::int32_t slot_in_mask(const Task& task, int token) {
    auto left = static_cast<unsigned>(task.first);
    for (int row = 0; row < token && row < task.rows; ++row) left &= left - 1;
    return __ffs(static_cast<int>(left)) - 1;
  }
  __device__ void fetch_slots(const Task& task) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const int token = pass_of(i) * S::kPassRows + row_in_pass();
      const bool listed = task.expert >= 0 && token < task.rows && !has_mask();
      slot_[i] = listed ? slot_of(p_, task.first + token) : -1;
    }
  }

  __device__ void prepare(const Task& task, unsigned char* table) {
    std::uint32_t* const rows = shared_.gathered();
    __syncwarp();  // all have read the previous task's rows
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const int pass = pass_of(i), token = pass * S::kPassRows + row_in_pass();
      if (pass >= S::kPassRoom) break;
      std::uint32_t row = kNone;
      if constexpr (S::kHasBlockScales) scale_[i] = kNone;
      if constexpr (kLateFactor) factor_at_ = nullptr;
      std::uint32_t c_row = kNoRow;
      float2 factor{1.0f, 1.0f};
      const float *scale = nullptr, *weight = nullptr;  // kCopiesFactors: in place of `factor`
      const std::int32_t slot = has_mask() ? slot_in_mask(task, token) : slot_[i];
      if (is_live(p_, slot) && token < task.rows) {
        const std::int64_t position = has_mask() ? slot : task.first + token;
        const std::int64_t a_row = row_of(p_, p_.a_row, position, slot);
        row = static_cast<std::uint32_t>(p_.a_rows(a_row));
        c_row = static_cast<std::uint32_t>(row_of(p_, p_.c_row, position, slot));
        if (p_.a_scale) {
          const std::int64_t at = a_row * p_.a_scale_row + task.expert * p_.a_scale_expert;
          if (block_scales())
            scale_[i] = static_cast<std::uint32_t>(at);
          else if constexpr (kCopiesFactors)
            scale = p_.a_scale + at;
          else if constexpr (kLateFactor)
            factor_at_ = p_.a_scale + at;
          else
            factor.x = p_.a_scale[at];
        }
        if (p_.row_weights) {
          if constexpr (kCopiesFactors)
            weight = p_.row_weights + slot;
          else
            factor.y = p_.row_weights[slot];
        }
      }
      // Elsewhere padding reads row 0, whose sums nobody stores.
      rows[row_in_pass() * S::kPassRoom + pass] = row == kNone && kPadded ? 0 : row;
      if (token < S::kTokens) {
        token_rows<S>(table)[token] = c_row;
        if constexpr (kCopiesFactors)
          copy_factors(token_factors<S>(table)[token], scale, weight);
        else if (kLateFactor && factor_at_ != nullptr)
          token_factors<S>(table)[token].y = factor.y;  // copy_token_scale brings x
        else
          token_factors<S>(table)[token] = factor;
      }
    }
    find_weight_scale(task.expert, task.weight_task);
    __syncwarp();
  }

  __device__ static void copy_factors(float2& to, const float* scale, const float* weight) {
    copy_factor(to.x, scale);
    copy_factor(to.y, weight);
  }
  __device__ static void copy_factor(float& to, const float* from) {
    if (from != nullptr)
      ptx::copy_async_4(ptx::shared_address(&to), from);
    else
      to = 1.0f;
  }

  // What the epilogue must know of the weight rows of a task that has products, to place
  // `term_place`; returns the next one's. It arrives with the first stage's tokens.
  __device__ int bring_terms(int expert, int weight_task, int term_place) {
    static_assert(!S::kBringsTerms || (S::kWeightRows == kLoaders<S> && S::kBox == S::kTokens));
    if (!brings_terms(p_) || expert < 0) return term_place;
    Epilogue<S>::bring(p_, shared_.epilogue(0), expert, weight_task, me(), term_place);
    __syncwarp();
    return term_place == S::kTermPlaces - 1 ? 0 : term_place + 1;
  }
  // The scale of this thread's token, asynchronously, into the table (kLateFactor).
  __device__ void copy_token_scale(unsigned char* table) {
    static_assert(!kLateFactor || kEntries == 1);
    if (factor_at_ == nullptr) return;
    const int token = pass_of(0) * S::kPassRows + row_in_pass();
    ptx::copy_async_4(ptx::shared_address(&token_factors<S>(table)[token].x), factor_at_);
  }
  // Given with the weights, it lies in memory as a rule, and its token in L2.
  __device__ void ask_for_factor() {
    if (factor_at_ != nullptr) ptx::prefetch_l2(factor_at_);
  }

  // Cells begin at multiples of eight rows, so one scale serves eight of them.
  __device__ void find_weight_scale(int expert, int weight_task) {
    if (!block_scales() || expert < 0 || me() >= S::kWeightRows / 8) return;
    const std::int64_t rows = p_.gated ? 2 * p_.columns : p_.columns;
    std::int64_t n = weight_row<S>(p_, weight_task, me() * 8);
    if (n >= rows) n = rows - 1;
    // Both fit 32 bits (TMA counts rows with as many), whose division is a third as long.
    const std::uint32_t cell =
        static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(p_.scale_group);
    weight_scale_ = static_cast<std::uint32_t>(expert * p_.scale_expert + cell * p_.scale_row);
  }

  __device__ void load_stages(const Load& load, int from, int to) {
    // Boxes are smaller than tiles, or not used: see set_tokens.
    const bool gather = S::kBox == S::kTokens || p_.token_load == TokenLoad::kGather;
    std::uint32_t rows[S::kPassRoom];
    if (kInRegisters && gather) {
#pragma unroll
      for (int i = 0; i < S::kPassRoom; i += 4) {
        const uint4 four =
            *reinterpret_cast<const uint4*>(shared_.gathered() + me() / 8 * S::kPassRoom + i);
        rows[i] = four.x, rows[i + 1] = four.y, rows[i + 2] = four.z, rows[i + 3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < S::kPassRoom; ++i) {
        if (!kPadded && !kSkipsPadding && rows[i] == kNone) rows[i] = 0;  // see prepare
      }
    }
    if constexpr (S::kHasBlockScales && S::kBlocks == 2) {
      if (p_.scale_quads && !gather) return load_boxes_and_scales(load);
    }
    for (int i = from; i < to; ++i) {
      ptx::barrier_wait(shared_.empty(cursor_.stage), cursor_.round ^ 1);
      const std::uint32_t full = shared_.full(cursor_.stage);
      const std::uint32_t dst = ptx::shared_address(shared_.tokens(cursor_.stage));
      if (gather && kInRegisters) gather_rows(load.rows, i, dst, rows);
      if (gather && !kInRegisters) gather_listed_rows(load.rows, i, dst);
      if (block_scales()) copy_scales(load.rows, i);
      if (gather || block_scales()) ptx::copy_async_arrive(full);
      if (!gather && (S::kBoxWarps == 1 ? me() == 0 : me() % 32 == 0))
        load_boxes(load, i, dst, full);
      // The tables are there: one arrival per warp (the last sync was behind them).
      if (thread() % 32 == 0) ptx::barrier_arrive(full);
      cursor_.advance();
    }
    __syncwarp();
  }

  __device__ void gather_rows(int live, int stage, std::uint32_t to,
                              const std::uint32_t (&rows)[S::kPassRoom]) {
    const std::uint64_t keep = ptx::read_often_policy();
    const int piece = me() % 8, lead = me() / 8;
    // Rows i * kPassRows + lead: swizzled alike in every pass, or (12 rows) in every second.
    const std::uint32_t even = to + lead * 128 + ((piece ^ lead % 8) << 4);
    const std::uint32_t odd = S::kPassRows % 8 == 0 ? even : even ^ 64;
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const std::int64_t at = static_cast<std::int64_t>(stage * S::kChunks + c) * 128 + piece * 16;
      const bool inside = at < p_.k_bytes;  // behind the end of K: zeros
      const char* from = p_.a + (inside ? at : 0);
      ptx::opaque(from);  // so that row * 16 + from is one instruction
      const std::uint32_t bytes = inside ? 16 : 0;
#pragma unroll
      for (int i = 0; i < S::kPasses; ++i) {
        if (kSkipsPadding ? rows[i] != kNone : i * S::kPassRows + lead < live) {
          const std::uint32_t dst =
              (i % 2 ? odd : even) + c * S::kTokenBytes + i * S::kPassRows * 128;
          const char* const row = from + std::uint64_t{rows[i]} * 16;
          if constexpr (S::kKeepsTokens) {
            ptx::copy_async_16(dst, row, bytes, keep);
          } else {
            ptx::copy_async_16(dst, row, bytes);
          }
        }
      }
    }
  }

  // The same with the offsets from shared memory, eight at a time.
  __device__ void gather_listed_rows(int live, int stage, std::uint32_t to) {
    static_assert((S::kPasses % 8 == 0 && S::kPassRows == 8) || kInRegisters);
    const int piece = me() % 8, lead = me() / 8;
    const std::uint32_t* const rows = shared_.gathered() + lead * S::kPassRoom;
    const std::uint32_t dst = to + lead * 128 + ((piece ^ lead) << 4);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const std::int64_t at = static_cast<std::int64_t>(stage * S::kChunks + c) * 128 + piece * 16;
      const bool inside = at < p_.k_bytes;
      const char* from = p_.a + (inside ? at : 0);
      ptx::opaque(from);
      const std::uint32_t bytes = inside ? 16 : 0;
#pragma unroll
      for (int i = 0; i < S::kPasses; i += 8) {
        const uint4 low = *reinterpret_cast<const uint4*>(rows + i);
        const uint4 high = *reinterpret_cast<const uint4*>(rows + i + 4);
        const std::uint32_t row[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if ((i + j) * 8 + lead < live) {
            ptx::copy_async_16(dst + c * S::kTokenBytes + (i + j) * 1024,
                               from + std::uint64_t{row[j]} * 16, bytes);
          }
        }
      }
    }
  }

  // Offsets of scales fit 32 bits: half the instructions of a stage where K is short.
  __device__ void copy_scales(int live, int stage) {
    const std::uint32_t to = ptx::shared_address(shared_.scales(cursor_.stage));
    const auto token_step = static_cast<std::uint32_t>(p_.a_scale_group);
    const auto weight_step = static_cast<std::uint32_t>(p_.scale_k);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int chunk = stage * S::kChunks + c;
      const auto group = static_cast<std::uint32_t>(chunk < p_.k_chunks ? chunk : p_.k_chunks - 1);
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        const int token = pass_of(i) * S::kPassRows + row_in_pass();
        if (token < live && scale_[i] != kNone) {
          ptx::copy_async_4(to + (c * S::kScales + token) * 4,
                            p_.a_scale + (scale_[i] + group * token_step));
        }
      }
      if (live > 0 && me() < S::kWeightRows / 8) {
        ptx::copy_async_4(to + (c * S::kScales + S::kTokens + me()) * 4,
                          p_.weight_scale + (weight_scale_ + group * weight_step));
      }
    }
  }

  // As a rule scales along K are neighbours, and four chunks' are loaded into registers at once. (A
  // copy of four bytes takes shared memory as long as one of 128: with one for each token and stage
  // the products took 10 to 18% longer.)
  static constexpr int kRowScales =
      S::kWeightRows / 8 <= kLoaders<S> ? S::kWeightRows / 8 : kLoaders<S>;
  struct ScaleQuads {
    float4 token[kEntries], row;
  };
  __device__ void load_scales(int live, int chunk, ScaleQuads& to) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (pass_of(e) * S::kPassRows + row_in_pass() < live && scale_[e] != kNone)
        to.token[e] = *reinterpret_cast<const float4*>(p_.a_scale + scale_[e] + chunk);
    }
    if (live > 0 && me() < kRowScales)
      to.row = *reinterpret_cast<const float4*>(p_.weight_scale + weight_scale_ + chunk);
  }
  __device__ static float one_of(const float4& quad, int i) {
    const float low = i % 2 ? quad.y : quad.x, high = i % 2 ? quad.w : quad.z;
    return i / 2 ? high : low;
  }
  __device__ void load_boxes_and_scales(const Load& load) {
    ScaleQuads scales;
    load_scales(load.rows, 0, scales);
    for (int i = 0; i < load.stages; ++i) {
      ptx::barrier_wait(shared_.empty(cursor_.stage), cursor_.round ^ 1);
      const std::uint32_t full = shared_.full(cursor_.stage);
      if (me() == 0) load_boxes(load, i, ptx::shared_address(shared_.tokens(cursor_.stage)), full);
      store_scales(load.rows, i, scales);
      __syncwarp();
      if (thread() % 32 == 0) ptx::barrier_arrive(full);
      cursor_.advance();
    }
  }
  // Those of one stage; behind the last of four the next four are requested.
  __device__ void store_scales(int live, int stage, ScaleQuads& scales) {
    float* const to = shared_.scales(cursor_.stage);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int chunk = stage * S::kChunks + c;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int token = pass_of(e) * S::kPassRows + row_in_pass();
        if (token < S::kTokens) to[c * S::kScales + token] = one_of(scales.token[e], chunk % 4);
      }
      if (me() < kRowScales) to[c * S::kScales + S::kTokens + me()] = one_of(scales.row, chunk % 4);
      if (chunk % 4 == 3 && chunk + 1 < p_.k_chunks) load_scales(live, chunk + 1, scales);
    }
  }

  // Whole boxes: rows of the next expert may come along, and nobody stores their sums. Warp w of
  // kBoxWarps asks for every kBoxWarps-th from its own on.
  __device__ void load_boxes(const Load& load, int stage, std::uint32_t to, std::uint32_t full) {
    constexpr int kBox = S::kBox, kWarps = S::kBoxWarps;
    const int boxes = (load.rows + kBox - 1) / kBox, first = kWarps == 1 ? 0 : me() / 32;
    const int mine = (boxes - first + kWarps - 1) / kWarps;
    if (mine == 0) return;
    ptx::barrier_expect(full, static_cast<std::uint32_t>(S::kChunks * mine * kBox * 128));
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      for (int b = first; b < boxes; b += kWarps) {
        ptx::tma_load_2d(to + c * S::kTokenBytes + b * kBox * 128, &p_.tokens, full,
                         (stage * S::kChunks + c) * S::kChunkK, load.first + b * kBox);
      }
    }
  }

  const Params& p_;
  const SharedMemory<S>& shared_;
  Cursor<S::kStages> cursor_;
  std::int32_t slot_[kEntries];
  std::uint32_t scale_[kEntries];  // where a token's scales begin
  std::uint32_t weight_scale_ = 0;
  const float* factor_at_ = nullptr;  // kLateFactor
};

}  // namespace moesaic::cuda::sm90
