#!/bin/sh
# Installs what is called and missing: curl and ip as clients in the demo and the
# tests, kcat, which reads what was sent to Kafka, strace to see what the server syncs,
# gcc for the race detector, node and npm for the published Node packages,
# and for root, who alone can run them, what the tests of Kubernetes run pods with
# (test/kubenode), the syslog daemon that events are sent to, and what those of
# virtual machines run and make their guest of (test/guest).
# Usage: deps.sh [demo|test]
set -eu
missing=""
command -v curl >/dev/null || missing="$missing curl ca-certificates"
if [ "${1:-test}" = test ]; then
    command -v ip >/dev/null || missing="$missing iproute2"
    command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
    command -v node >/dev/null || missing="$missing nodejs"
    command -v npm >/dev/null || missing="$missing npm"
    command -v strace >/dev/null || missing="$missing strace"
    command -v kcat >/dev/null || missing="$missing kcat"
    if [ "$(id -u)" = 0 ]; then
        [ -x /usr/sbin/rsyslogd ] || missing="$missing rsyslog rsyslog-gnutls"
        command -v qemu-system-x86_64 >/dev/null || missing="$missing qemu-system-x86"
        command -v qemu-img >/dev/null || missing="$missing qemu-utils"
        command -v pgrep >/dev/null || missing="$missing procps"
        command -v nft >/dev/null || missing="$missing nftables"
        command -v ssh >/dev/null || missing="$missing openssh-client"
        command -v genisoimage >/dev/null || missing="$missing genisoimage"
        command -v busybox >/dev/null || missing="$missing busybox-static"
        command -v dropbear >/dev/null || missing="$missing dropbear-bin"
        command -v jq >/dev/null || missing="$missing jq"
        command -v cpio >/dev/null || missing="$missing cpio"
        command -v mformat >/dev/null || missing="$missing mtools"
        command -v mkfs.ext4 >/dev/null || missing="$missing e2fsprogs"
        [ -x /usr/sbin/libvirtd ] || missing="$missing libvirt-daemon-system libvirt-daemon-driver-qemu ipxe-qemu"
        command -v containerd >/dev/null || missing="$missing containerd"
        command -v runc >/dev/null || missing="$missing runc"
        [ -x /usr/lib/cni/bridge ] || missing="$missing containernetworking-plugins"
        command -v syslinux >/dev/null || missing="$missing syslinux syslinux-common"
    fi
fi
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "missing:$missing (install it and run again)" >&2
    exit 1
fi
apt-get update -q
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
