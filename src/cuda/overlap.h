// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch, the device's side: kernels of a stream overlap, and this is what
// each of them keeps to. (A launch asks for it with Dependency::kOverlap; below SM90 there is no
// such thing, and the functions are empty.)
//
// 1. Nothing that an earlier kernel wrote or reads is touched before wait_for_earlier_kernels: it
//    returns when all of them have ended and what they wrote is visible. (Weights are written by no
//    kernel: they may be fetched before.)
// 2. let_next_kernel_start comes behind the wait, never before. The next kernel may then be
//    scheduled on free SMs; it waits for our end in the same way. So once a kernel has started, all
//    have ended but the one in front of it, and what that one does not touch may be used without a
//    wait: ListAge::kSettled says so of lists. Such reads go through L2 (__ldcg), because a line of
//    L1 may be older.
// 3. The exception: between two products (or in front of the first) stands a short kernel whose own
//    beginning is all that the next one's launch waits for, about a microsecond. It lets the next
//    start at once, where that one touches before its wait nothing but weights and what was
//    complete before the kernel in front of *this* one let anybody start. So it is with the
//    quantizer between GEMM1 and GEMM2 (the lists are older than GEMM1), and with align behind the
//    quantizer of x, and with tiles (what follows touches nothing before it waits for the list).
// 4. Every grid waits before it ends, whatever it had to do: its successor waits for nobody else.
#pragma once

namespace moesaic::cuda {

__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both: the first thing in a kernel that has nothing to do before.
__device__ __forceinline__ void begin_kernel() {
  wait_for_earlier_kernels();
  let_next_kernel_start();
}

// The beginning of a kernel under rule 3; settled: it still has to wait, before it ends at the
// latest.
__device__ __forceinline__ void begin_between(bool settled) {
  if (!settled) wait_for_earlier_kernels();
  let_next_kernel_start();
}

}  // namespace moesaic::cuda
