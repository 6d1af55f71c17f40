#!/bin/sh
# Runs all suites. What takes longest to compile and needs nothing of ours, the
# linter, Kubernetes, Terraform with its provider, and a collector, is built beside the tests,
# because each leaves a core idle while the other compiles. The first time that is
# twenty minutes of both cores; the results stay in .cache.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .cache
make -s lint >.cache/lint.log 2>&1 &
lint=$!
nice make -s collector >.cache/collector.log 2>&1 &
collector=$!
nice make -s kube-binaries >.cache/kube.log 2>&1 &
kube=$!
nice make -s terraform-binaries >.cache/terraform.log 2>&1 &
terraform=$!
status=0
say() { printf '\n=== %s (%s)\n' "$1" "$(date +%H:%M:%S)"; }

say "unit, race, property and fuzz-corpus tests"
make -s unit || status=1
say "examples"
make -s examples || status=1
wait "$collector" || { status=1; cat .cache/collector.log; }
say "end to end: the built binary with curl and the published SDKs"
make -s e2e || status=1
say "virtual servers: hosts, QEMU machines under software emulation, attacks"
vm=0
make -s -o build test-vm >.cache/vm.log 2>&1 || vm=1 status=1
grep -E '^(=== RUN|--- |\s+--- |ok|FAIL|PASS|panic)' .cache/vm.log | grep -v '=== RUN' || true
[ "$vm" = 0 ] || cat .cache/vm.log
say "lint"
wait "$lint" || status=1
cat .cache/lint.log
say "Kubernetes: a real API server, its tokens, webhooks and nodes"
if wait "$kube"; then
    kubernetes=0
    make -s -o build test-kubernetes ARGS=-v >.cache/kubernetes.log 2>&1 || kubernetes=1 status=1
    if [ "$kubernetes" = 0 ]; then
        grep -E '^ok' .cache/kubernetes.log
        # What was skipped was not tested; the line before says why.
        grep -B1 -E '^ *--- SKIP' .cache/kubernetes.log || echo "nothing was skipped"
    else
        cat .cache/kubernetes.log
    fi
else
    status=1
    cat .cache/kube.log
fi
say "the published suites against the built binary, and Terraform with the published provider"
wait "$terraform" || { status=1; cat .cache/terraform.log; }
# Both wait more than they work, so they run together. The binary is built.
make -s -o build test-terraform >.cache/terraform.log 2>&1 &
terraform=$!
make -s -o build conformance || status=1
wait "$terraform" || status=1
cat .cache/terraform.log
[ "$status" = 0 ] && say "all suites passed" || say "FAILED"
exit "$status"
