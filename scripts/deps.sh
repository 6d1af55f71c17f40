#!/bin/sh
# Installs what is called and missing: curl and ip as clients in the demo and the
# tests, gcc for the race detector, node and npm for the published Node packages. Usage: deps.sh [demo|test]
set -eu
missing=""
command -v curl >/dev/null || missing="$missing curl ca-certificates"
if [ "${1:-test}" = test ]; then
    command -v ip >/dev/null || missing="$missing iproute2"
    command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
    command -v node >/dev/null || missing="$missing nodejs"
    command -v npm >/dev/null || missing="$missing npm"
fi
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing:$missing (install it and run again)" >&2
    exit 1
fi
apt-get update -q
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
