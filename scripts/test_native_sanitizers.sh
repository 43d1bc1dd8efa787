#!/usr/bin/env bash
# The native CPU kernels under the sanitizers, and on aarch64 where its compiler and emulator are installed; without Python.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SOURCES=$ROOT/pallas_kernels/cpu/src
CASES=${CASES:-60}

case ${1:-} in
  -h | --help)
    cat <<HELP
Usage: scripts/test_native_sanitizers.sh [KIND...]

Builds tests/pallas_kernels/test_cpu_driver.cc with the kernels and runs its unit and fuzz cases. KIND is one or more of
  address      AddressSanitizer
  undefined    UndefinedBehaviorSanitizer
  thread       ThreadSanitizer
  clang        another compiler, without a sanitizer
  aarch64      cross-compiled, run by qemu-user (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)
By default all of them; clang and aarch64 are left out, and that is said, where their tools are not installed.
Variables: CXX (g++), CLANGXX (clang++), CASES ($CASES), SEED (a new one each time).
HELP
    exit 0
    ;;
esac

CXX=${CXX:-g++}
kinds=("$@")
if [ ${#kinds[@]} = 0 ]; then kinds=(address undefined thread clang aarch64); fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
units=()
for unit in "$SOURCES"/*.cc; do
  [ "$(basename "$unit")" = handlers.cc ] || units+=("$unit") # needs XLA's headers
done

# compile OUT COMPILER FLAGS...: the driver, its units two at a time
compile() {
  local out=$1 compiler=$2
  shift 2
  mkdir -p "$out.d"
  printf '%s\n' "${units[@]}" "$ROOT/tests/pallas_kernels/test_cpu_driver.cc" |
    xargs -P 2 -I{} sh -c '"$@" -c "{}" -o "$0/$(basename "{}").o"' "$out.d" "$compiler" -std=c++17 -g -w -I"$SOURCES" "$@"
  "$compiler" "$@" -pthread "$out.d"/*.o -o "$out"
}

for kind in "${kinds[@]}"; do
  echo "== $kind"
  run=()
  case $kind in
    address) compile "$work/$kind" "$CXX" -O1 -fsanitize=address -fno-omit-frame-pointer ;;
    undefined) compile "$work/$kind" "$CXX" -O0 -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all ;;
    thread) compile "$work/$kind" "$CXX" -O1 -fsanitize=thread ;;
    clang)
      if ! command -v "${CLANGXX:-clang++}" >/dev/null; then
        echo "skipped: no ${CLANGXX:-clang++} here; name one in CLANGXX"
        continue
      fi
      compile "$work/$kind" "${CLANGXX:-clang++}" -O2
      ;;
    aarch64)
      if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
        echo "skipped: needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
        continue
      fi
      compile "$work/$kind" aarch64-linux-gnu-g++ -O2 -static
      run=(qemu-aarch64)
      ;;
    *)
      echo "unknown kind $kind; see --help" >&2
      exit 2
      ;;
  esac
  "${run[@]}" "$work/$kind" "$CASES" ${SEED:+"$SEED"}
done
