#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every libFuzzer target of a build folder for some seconds, from its committed corpus.
#   scripts/run_fuzzers.sh build/fuzz SECONDS      FUZZ_ONLY=regex picks targets by name
set -euo pipefail
build=$1 seconds=$2
root=$(cd "$(dirname "$0")/.." && pwd)
found=0
for target in "$build"/*_fuzz; do
  [ -x "$target" ] || continue
  [[ $(basename "$target") =~ ${FUZZ_ONLY:-.} ]] || continue
  found=$((found + 1))
  name=$(basename "$target")
  # New inputs go to a scratch folder: the committed corpus only grows by hand.
  scratch=$build/corpus/$name
  mkdir -p "$scratch"
  corpus=()
  [ -d "$root/tests/fuzz/corpus/$name" ] && corpus=("$root/tests/fuzz/corpus/$name")
  echo "fuzzing $name for $seconds s"
  # One seed: what a run finds, the next finds, too. Long hunts start the target by hand.
  "$target" -seed=1 -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 \
    -artifact_prefix="$build/$name-" "$scratch" "${corpus[@]}" >"$build/$name.log" 2>&1 ||
    { tail -n 60 "$build/$name.log"; echo "$name: FAILED; the input lies beside $build/$name"; exit 1; }
  grep -E 'stat::number_of_executed_units|stat::new_units_added' "$build/$name.log" || true
done
[ "$found" -gt 0 ] || { echo "run_fuzzers.sh: no *_fuzz in $build" >&2; exit 1; }
