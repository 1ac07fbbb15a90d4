// SPDX-License-Identifier: Apache-2.0
// Hopper's own instructions as functions: mbarrier, TMA, cp.async, stmatrix, warpgroup control.
// With the other ptx_*_sm90.h and overlap.h all inline assembly of the SM90 families.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moesaic::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// --- mbarrier
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "TRY:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni DONE;\n"
      "bra.uni TRY;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Whether that round has ended, without waiting for it.
__device__ __forceinline__ bool barrier_passed(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t passed;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
}

// The barrier at the same address in CTA `rank` of this cluster. (With .release.cluster spelled
// out, ptxas puts a full memory barrier in front, which stalled the multiplying warps for a third
// of their time. What this arrival orders are wgmma's reads, and they are complete.)
__device__ __forceinline__ void barrier_arrive_at(std::uint32_t barrier, std::uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// --- how long L2 keeps what a copy reads
// Read once: no longer than others of its kind. Read again and again: until nothing else is left.
// (A copy with the policy evict_normal was 1 to 4% slower than one without a policy.)
__device__ __forceinline__ std::uint64_t read_once_policy() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ std::uint64_t read_often_policy() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// --- copies
// A global-to-shared copy of 16 bytes; `bytes` of them (16 or 0) are read, the rest becomes zero.
__device__ __forceinline__ void copy_async_16(std::uint32_t dst, const void* src,
                                              std::uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_16(std::uint32_t dst, const void* src,
                                              std::uint32_t bytes, std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(dst),
               "l"(src), "r"(bytes), "l"(policy)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(std::uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}
// kBytes of 4, 8 or 16, of which only `bytes` are read; the rest becomes zero.
template <int kBytes>
__device__ __forceinline__ void copy_async_part(std::uint32_t dst, const void* src,
                                                std::uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(kBytes),
               "r"(bytes)
               : "memory");
}
// One of the barrier's expected arrivals, made when this thread's copies so far have landed.
__device__ __forceinline__ void copy_async_arrive(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// This thread's copies so far have landed.
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
}
__device__ __forceinline__ void tensor_map_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tma_load_2d(std::uint32_t dst, const CUtensorMap* map,
                                            std::uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load_5d(std::uint32_t dst, const CUtensorMap* map,
                                            std::uint32_t barrier, int x, int y, int z, int u,
                                            int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
      : "memory");
}
__device__ __forceinline__ void tma_load_5d(std::uint32_t dst, const CUtensorMap* map,
                                            std::uint32_t barrier, std::uint64_t policy, int x,
                                            int y, int z, int u, int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v), "l"(policy)
      : "memory");
}
// The same into the same place of both CTAs of a pair, each of whose barriers counts the bytes.
__device__ __forceinline__ void tma_load_5d_pair(std::uint32_t dst, const CUtensorMap* map,
                                                 std::uint32_t barrier, int x, int y, int z, int u,
                                                 int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v), "h"(std::uint16_t{3})
      : "memory");
}
// What generic-proxy writes (cp.async among them) put into shared memory becomes visible to wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 32 bytes; volatile, so that the compiler reads again and does not keep them.
__device__ __forceinline__ void load_shared_32(std::uint32_t from, void* to) {
  auto* const out = static_cast<std::uint32_t*>(to);
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from));
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[4]), "=r"(out[5]), "=r"(out[6]), "=r"(out[7])
               : "r"(from + 16));
}
__device__ __forceinline__ float4 load_shared_4(std::uint32_t from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(from));
  return v;
}
// Eight bytes that another warp may be waiting for: seen together, or not yet.
__device__ __forceinline__ void load_shared_pair(std::uint32_t from, unsigned& a, unsigned& b) {
  asm volatile("{ .reg .b64 v; ld.volatile.shared.b64 v, [%2]; mov.b64 {%0, %1}, v; }"
               : "=r"(a), "=r"(b)
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void store_shared_pair(std::uint32_t to, unsigned a, unsigned b) {
  asm volatile("{ .reg .b64 v; mov.b64 v, {%1, %2}; st.volatile.shared.b64 [%0], v; }" ::"r"(to),
               "r"(a), "r"(b)
               : "memory");
}
// Stores 8x8 matrices of 16-bit elements transposed: lane l gives the address of row l.
__device__ __forceinline__ void store_matrix_x2_transposed(std::uint32_t dst, std::uint32_t a,
                                                           std::uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(dst), "r"(a),
               "r"(b)
               : "memory");
}
__device__ __forceinline__ void store_matrix_x4_transposed(std::uint32_t dst, std::uint32_t a,
                                                           std::uint32_t b, std::uint32_t c,
                                                           std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// An 8x8 matrix of 16-bit elements, of which lane l has elements 2 (l % 4) and the next of row l /
// 4: the same of its transpose. Volatile, so that it stays where all lanes are.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t part) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(part));
  return out;
}

// 4, 8 or 16 bytes to global memory, unless the row is nowhere. Under a predicate: a branch would
// keep apart what comes before and behind it.
inline constexpr std::uint32_t kNowhere = 0xffffffffu;
__device__ __forceinline__ void store_row(std::uint32_t row, char* to, std::uint32_t a) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, -1; @p st.global.u32 [%1], %2; }" ::"r"(row),
               "l"(to), "r"(a)
               : "memory");
}
__device__ __forceinline__ void store_row(std::uint32_t row, char* to, std::uint32_t a,
                                          std::uint32_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %0, -1; @p st.global.v2.u32 [%1], {%2, %3}; }" ::"r"(row),
      "l"(to), "r"(a), "r"(b)
      : "memory");
}
__device__ __forceinline__ void store_row(std::uint32_t row, char* to, std::uint32_t a,
                                          std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %0, -1; @p st.global.v4.u32 [%1], {%2, %3, %4, %5}; }" ::"r"(
          row),
      "l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// threadIdx.x, read again wherever it is asked for: so nothing that follows from it is kept in
// registers across the main loop.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The compiler no longer knows where this value comes from.
__device__ __forceinline__ void opaque(const char*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void opaque(char*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void opaque(int& v) { asm volatile("" : "+r"(v)); }

// --- threads
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// The 128 threads of one warpgroup meet; id 0 belongs to __syncthreads.
template <int kId>
__device__ __forceinline__ void warpgroup_sync() {
  asm volatile("bar.sync %0, 128;" ::"n"(kId) : "memory");
}
__device__ __forceinline__ void both_warpgroups_sync() {
  asm volatile("bar.sync 7, 256;" ::: "memory");
}
__device__ __forceinline__ void pair_of_warps_sync(int id) {
  asm volatile("bar.sync %0, 64;" ::"r"(id) : "memory");
}

}  // namespace moesaic::cuda::ptx
