#!/bin/sh
# Installs the Debian 12 or 13 packages that the lab needs and that are missing (root or sudo).
# Usage: sh tests/lab/setup.sh [MORE_PACKAGES...]
set -eu

packages="qemu-system-x86 mmdebstrap debian-archive-keyring e2fsprogs kmod zstd fakeroot
    gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross make python3 python3-venv ca-certificates $*"
as_root=""
if [ "$(id -u)" != 0 ]; then
    as_root="sudo"
    packages="$packages uidmap" # mmdebstrap without root
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "lab: not a Debian system; install the equivalents of:" $packages >&2
    exit 0
fi

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "lab: system packages: all installed" >&2
    exit 0
fi
if [ -n "$as_root" ] && ! command -v sudo >/dev/null; then
    echo "lab: needs root or sudo to install:$missing" >&2
    exit 1
fi

install() {
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        -o Dpkg::Use-Pty=0 $missing
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "lab: installing$missing ..." >&2
if ! install >"$log" 2>&1; then
    echo "lab: fetching package lists, then retrying ..." >&2
    $as_root apt-get update -q >"$log" 2>&1 || { tail -n 5 "$log" >&2; exit 1; }
    install >"$log" 2>&1 || { tail -n 5 "$log" >&2; exit 1; }
fi
echo "lab: installed$missing" >&2
