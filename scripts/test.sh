#!/bin/sh
# Runs all suites. The linter's build and run go on beside the tests, because
# each leaves a core idle while the other compiles; its log comes at the end.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .cache
log=.cache/lint.log
make -s lint >"$log" 2>&1 &
lint=$!
status=0
say() { printf '\n=== %s (%s)\n' "$1" "$(date +%H:%M:%S)"; }

say "unit, race, property and fuzz-corpus tests"
make -s unit || status=1
say "examples"
make -s examples || status=1
say "end to end: the built binary with curl and the published SDKs"
make -s e2e || status=1
say "the published suites against the built binary"
make -s conformance || status=1
say "lint"
wait "$lint" || status=1
cat "$log"
[ "$status" = 0 ] && say "all suites passed" || say "FAILED"
exit "$status"
