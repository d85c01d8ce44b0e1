#!/usr/bin/env bash
# Linux on ARM where there is none, by emulation: bash tests/support/arm64.sh FOLDER COMMAND...
# The first call fills FOLDER (12 GB) with Debian's arm64 packages and, for aarch64, the wheels of the versions in .venv;
# every call copies the last commit there and runs COMMAND in it. Nothing of this machine's settings is changed.
# QEMU_CPU: cortex-a72 (the default; a Raspberry Pi 4: no bf16, no dot products), neoverse-n2 (bf16, SVE), max.
# Needs root for debootstrap, qemu-aarch64 (static, 8.2 or newer: older ones show the other processor's /proc/cpuinfo;
# QEMU names another), the kernel's user namespaces (Linux 6.7), and a .venv of Python 3.11, as Debian 12's is.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="$(realpath -m "$1")"
shift
system="$folder/system" wheels="$folder/wheels" packages="repo/.venv/lib/python3.11/site-packages"
pip="$root/.venv/bin/pip"

install_system() {
  local name
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,python3-dev,g++,procps bookworm "$folder/debian"
  mkdir -p "$system"/{proc,sys,dev,tmp,root}
  for name in "$folder"/debian/var/cache/apt/archives/*.deb; do dpkg -x "$name" "$system"; done
  for name in gcc g++; do ln -sf $name-12 "$system/usr/bin/$name"; done
  ln -sf g++-12 "$system/usr/bin/c++"
  echo "root:x:0:0:root:/root:/bin/bash" >"$system/etc/passwd"
}

install_wheels() {
  local version tags=(--python-version 3.11 --only-binary=:all: --quiet --platform manylinux2014_aarch64) package
  for version in $(seq 17 39); do tags+=(--platform "manylinux_2_${version}_aarch64"); done
  mkdir -p "$wheels" "$system/repo/.venv/bin"
  "$pip" freeze | grep -v -e '^torch==' -e '^deepspeed==' >"$folder/versions.txt"
  "$pip" download "${tags[@]}" --dest "$wheels" --constraint "$folder/versions.txt" pip \
    "$(grep -o '^torch==[0-9.]*' "$root/requirements.txt")"
  while read -r package; do
    "$pip" download "${tags[@]}" --no-deps --dest "$wheels" "$package" || echo "left out: $package"
  done <"$folder/versions.txt"
  "$pip" install "${tags[@]}" --no-deps --no-compile --no-index --target "$system/$packages" "$wheels"/*.whl
  cp -r "$root/.venv/lib/python3.11/site-packages"/deepspeed* "$system/$packages" # Python alone
  ln -sf /usr/bin/python3.11 "$system/repo/.venv/bin/python"
  echo "home = /usr/bin" >"$system/repo/.venv/pyvenv.cfg"
}

[ -d "$system" ] || install_system
[ -d "$system/$packages" ] || install_wheels
git -C "$root" archive HEAD | tar -x -C "$system/repo"

# qemu is registered for aarch64 in namespaces of its own, which end with the command.
export QEMU="${QEMU:-$(command -v qemu-aarch64-static qemu-aarch64 | head -n 1)}" QEMU_CPU="${QEMU_CPU:-cortex-a72}"
# shellcheck disable=SC2016 # expanded inside
exec unshare --map-root-user --mount bash -euc '
  system="$1"; shift
  mkdir -p "$system/../binfmt"
  mount -t binfmt_misc none "$system/../binfmt"
  magic="\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
  mask="\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
  printf %s ":arm64:M::$magic:$mask:$QEMU:OCF" >"$system/../binfmt/register"
  for name in proc sys dev; do mount --rbind "/$name" "$system/$name"; done
  exec chroot "$system" /usr/bin/env -i HOME=/root PATH=/usr/bin:/bin LANG=C.UTF-8 QEMU_CPU="$QEMU_CPU" \
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" bash -c "cd /repo && exec \"\$@\"" bash "$@"
' bash "$system" "$@"
