#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the Debian packages that a part of this project needs and this machine lacks.
#   scripts/install_deps.sh build|fuzz|python
# Says what is missing and what it does. Where it may not install, it says what to type and exits 2.
set -euo pipefail

case "${1:-build}" in
  build)  packages="g++ cmake ninja-build ccache libfmt-dev nlohmann-json3-dev libcli11-dev libgtest-dev" ;;
  fuzz)   packages="clang libclang-rt-dev" ;;  # the runtime is only recommended by clang
  python) packages="python3 python3-venv" ;;
  *) echo "install_deps.sh: unknown part '$1'; known: build, fuzz, python" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "install_deps.sh: not a Debian-like system, so nothing is installed. Needed (Debian's names):" >&2
  echo "  $packages" >&2
  exit 0  # CMake names what it does not find
fi

missing=()
for package in $packages; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] ||
    missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "Missing Debian packages: ${missing[*]}" >&2
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  # Ask for a password only where somebody can type one.
  if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
    as_root=(sudo)
  else
    echo "They cannot be installed from here (not root, no sudo). Type, or ask your administrator for:" >&2
    echo "  sudo apt-get install ${missing[*]}" >&2
    exit 2
  fi
fi
echo "Installing them: ${as_root[*]} apt-get install ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
install() { "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }
# The package lists of a new machine may be absent or old: refresh them only when needed.
if ! install 2>/dev/null; then
  "${as_root[@]}" apt-get update -qq >&2 || true
  if ! install; then
    echo "apt-get could not install them. Type, or ask your administrator for:" >&2
    echo "  sudo apt-get update && sudo apt-get install ${missing[*]}" >&2
    exit 2
  fi
fi
