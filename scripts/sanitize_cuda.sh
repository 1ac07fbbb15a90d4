#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# compute-sanitizer over small cases of the CUDA tests, several processes at a time; needs a GPU.
#   scripts/sanitize_cuda.sh build/cuda     JOBS=8  LIMIT=600 (seconds of one run)  ONLY=regex of "tool target"
# What a run printed stays in BUILD/sanitize. Exit code 1: a report, a failed test, or a run that did not end.
# Reports that are none (why: docs/log_sm90_dequant.md, "Checks") are counted apart; their logs are worth a look all the same:
#   racecheck, weight-only kernels of SM90: between cp.async and reads behind an mbarrier, which it does not follow
#   memcheck, 4-bit zero points: a read of 4 bytes where a cp.async asks for 2 of them
set -euo pipefail
build=${1:?the build folder, e.g. build/cuda} jobs=${JOBS:-8} limit=${LIMIT:-600}
out=$build/sanitize
mkdir -p "$out"
command -v compute-sanitizer >/dev/null || { echo "sanitize_cuda.sh: no compute-sanitizer on the PATH" >&2; exit 2; }

cases() {  # tools (m r s i) | target | arguments; MOESAIC_TEST_ROUNDS is 2 in all
  cat <<'LIST'
mrsi|align_cuda_test|--gtest_filter=AlignCuda.*:TilesCuda.*-*ManySlots
mrsi|route_cuda_test|--gtest_filter=*EveryMethod*:*NotANumber*:*FromHidden*
mrsi|quantize_cuda_test|--gtest_filter=*EveryGranularity*:*Batched*
mrsi|quantize_align_cuda_test|
mrsi|rows_cuda_test|--gtest_filter=-*64Bit
mrsi|gemm_sm80_test|--gtest_filter=*RandomShapes
mrsi|gemm_sm90_test|--gtest_filter=*Random*
mrsi|gemm_sm90_dequant_test|--gtest_filter=*RandomShapes
mrsi|gemm_sm90_quantize_test|--gtest_filter=*Groups*
ms|blocks_cuda_test|
ms|layer_cuda_test|--gtest_filter=*FewSlots*
LIST
  for kernels in sm80 sm90a; do  # the case list itself, a few of each scheme
    for scheme in f32 f16 bf16 fp8_tensor fp8_channel fp8_block fp8_w8a16 int8_channel int8_block int8_w8a16 int4_w4a16 mxfp4_w4a16; do
      echo "mi|moesaic|verify --backend cuda --kernels $kernels --scheme $scheme --tokens 1,3 --limit 24"
    done
  done
}

known() {  # tool, target and arguments: reports of these are none
  case "$1 $2 $3" in
    "racecheck gemm_sm90_dequant_test "*) echo 'Race reported .*dequant' ;;
    "memcheck gemm_sm80_test "* | "memcheck gemm_sm90_dequant_test "* | "memcheck moesaic "*int4*) echo 'Invalid __global__ read of size 4 bytes' ;;
    *) echo '^$' ;;
  esac
}

one() {  # tool|target|arguments
  IFS='|' read -r tool target arguments <<<"$1"
  local log status=0 reports mine
  log=$out/$tool-$target-$(tr -c 'a-zA-Z0-9\n' _ <<<"$arguments").log
  # shellcheck disable=SC2086
  MOESAIC_TEST_ROUNDS=2 MOESAIC_SM90_CASES=2 timeout "$limit" compute-sanitizer --tool "$tool" "$build/$target" $arguments >"$log" 2>&1 || status=$?
  reports=$(grep -cE '^========= (Error: |Warning: |Invalid |Uninitialized |Barrier |Divergent |Race )' "$log" || true)
  mine=$(grep -E '^========= (Error: |Warning: |Invalid |Uninitialized |Barrier |Divergent |Race )' "$log" | grep -vcE "$(known "$tool" "$target" "$arguments")" || true)
  if [ "$status" -eq 124 ]; then echo "DID NOT END  $tool $target $arguments"
  elif [ "$status" -ne 0 ] || [ "$mine" -gt 0 ] || ! grep -q 'ERROR SUMMARY\|RACECHECK SUMMARY' "$log"; then echo "FAILED       $tool $target $arguments: $log"
  elif [ "$reports" -gt 0 ]; then echo "known        $tool $target $arguments: $reports reports that are none"
  else echo "clean        $tool $target $arguments"; fi
}
export -f one known
export build limit out

declare -A tools=([m]=memcheck [r]=racecheck [s]=synccheck [i]=initcheck)
cases | while IFS='|' read -r letters target arguments; do
  for ((i = 0; i < ${#letters}; ++i)); do
    tool=${tools[${letters:i:1}]}
    [[ "$tool $target" =~ ${ONLY:-.} ]] && echo "$tool|$target|$arguments"
  done
  true
done | xargs -d '\n' -P "$jobs" -I{} bash -c 'one "$1"' _ {} | tee "$out/summary.txt"
! grep -qE '^(FAILED|DID NOT END)' "$out/summary.txt"
