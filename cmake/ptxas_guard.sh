#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a CUDA compiler command and fails it when ptxas says that it made a kernel slow: wgmma serialized
# (C7510, C7511, ...), setmaxnreg ignored (C7508), or more than MOST bytes spilled. ptxas calls the first
# two "info", so its own -Werror does not see them, and its -Werror for spills knows no measure: a few
# registers parked outside the main loop cost nothing. (Most has the e4m3 pair kernel without scales
# along K, for the loop of 144 tokens; with 352 it still was 5% faster than with fewer and the longer
# epilogue.)
MOST=240
messages=$(mktemp) || exit 1
trap 'rm -f "$messages"' EXIT
"$@" 2>"$messages"
status=$?
cat "$messages" >&2
[ "$status" -eq 0 ] || exit "$status"
verdict=$(awk -v most=$MOST '
  /Potential Performance Loss/ || /\(C75(08|1[0-6])\)/ { print "serialized or ignored: see above"; exit }
  match($0, /[0-9]+ bytes spill stores/) && substr($0, RSTART) + 0 > most { print "spills: see above"; exit }
' "$messages")
[ -z "$verdict" ] && exit 0
echo "ptxas_guard: a kernel would run at a fraction of its speed: $verdict" >&2
while [ $# -gt 1 ]; do  # no object: the next build must not take it for finished
  [ "$1" = "-o" ] && rm -f "$2"
  shift
done
exit 1
