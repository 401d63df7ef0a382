#!/bin/sh
# Prepares a clone: system packages (Debian 12, 13; root or sudo) and the virtual environment .venv
# with the development tools. Does only what is missing; can be run again after an interruption.
# Usage: sh tests/setup.sh [--no-system]
set -eu
cd "$(dirname "$0")/.."
venv=.venv
ready=$venv/.ready-for

say() { echo "setup: $*" >&2; }

system() {
    services=""
    for service in prometheus prometheus-alertmanager; do
        command -v "$service" >/dev/null || services="$services $service"
    done
    sh tests/lab/setup.sh chromium curl openssl prometheus prometheus-alertmanager tmux
    # Tests start their own on free ports; disable the services that Debian's packages have just started.
    if [ -n "$services" ] && [ -d /run/systemd/system ]; then
        as_root=""
        [ "$(id -u)" = 0 ] || as_root=sudo
        # shellcheck disable=SC2086
        $as_root systemctl disable --quiet --now $services 2>/dev/null || true
    fi
}

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prefer the distribution's Python: only it can share the distribution's packages.
find_python() {
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    say "needs Python 3.11 or newer (PYTHON=... names one)"
    exit 1
}

if [ "${1:-}" != --no-system ] && ! system; then
    # Unit tests do not need them, but CI must not pass without.
    [ "${KVMTRACE_LAB:-}" != 1 ] || exit 1
    say "continuing without the system packages: the lab cannot run"
fi

wanted=$(cksum pyproject.toml)
if fits $venv/bin/python && [ "$(cat $ready 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
if ! fits $venv/bin/python || ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making $venv with $python"
    rm -rf $venv
    if ! "$python" -m venv $venv >/dev/null 2>&1; then
        say "this Python cannot make virtual environments; on Debian: apt install python3-venv"
        rm -rf $venv
        exit 1
    fi
fi
say "installing kvmtrace and its development tools into $venv (a minute or two) ..."
$venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
echo "$wanted" >$ready
say "ready"
