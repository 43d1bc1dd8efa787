#!/usr/bin/env bash
# The checks of this repository: format, lint, types, tests.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: scripts/test.sh [--slow | --full | --root | --oracle | --all] [PYTEST ARGUMENT ...]

Makes the environment (.venv, or the folder named by JAXINFER_VENV) with what tests need, fetches the small model that some of
them read (93 MB, once), checks format, lint and types, and runs the tests on the CPU.

  (no option)   everything that takes seconds: no slow, full, gpu, root or oracle tests
  --slow        the slow tests instead, without format, lint and types; with jax-triton (200 MB, once) where the jax is one it works with
  --full        full products instead, of what the others take one of each of
  --root        the tests that need root instead, which start real launchers (scripts/launchers_env.sh installs them) and two hosts with a
                slow link; what is not installed is skipped
  --oracle      the comparison with transformers on torch instead, in an environment made by scripts/oracle_env.sh, and with other
                systems' quantisers in those of scripts/quantizers_env.sh and scripts/bench/peers_env.sh (llama.cpp)
  --all         all of these, and the root tests when run as root

Further arguments go to pytest, for instance: scripts/test.sh -k rope -x
  JAXINFER_TEST_WORKERS=N   pytest processes (pytest-xdist); by default one per core, at most 4, with 4 GB of memory each
  JAXINFER_TEST_GGUF=/path/to/SmolLM2-135M-Instruct.Q4_1.gguf   use this file instead of fetching it
HELP
}

mode=quick
case ${1:-} in
  -h | --help)
    usage
    exit 0
    ;;
  --slow | --full | --root | --oracle | --all)
    mode=${1#--}
    shift
    ;;
esac

if [ "$mode" = root ] && [ "$(id -u)" != 0 ]; then
  echo "scripts/test.sh --root: these tests need root" >&2
  exit 1
fi

# Where there is a compiler the native kernels must build, and are tested; without one everything runs on XLA.
if [ -n "${CXX:-}" ] || command -v c++ g++ clang++ >/dev/null; then
  export JAXINFER_REQUIRE_NATIVE=${JAXINFER_REQUIRE_NATIVE:-1}
fi

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_env test
add_deviceless
case ${mode} in slow | all) add_triton ;; esac
cd "$JAXINFER_ROOT"
bin=$(dirname "$JAXINFER_PYTHON")

gguf=${JAXINFER_TEST_GGUF:-}
[ -n "$gguf" ] || gguf=$("$JAXINFER_PYTHON" -m jaxinfer.demo)
[ -f "$gguf" ] || { say "JAXINFER_TEST_GGUF=$gguf: there is no such file"; exit 1; }
export JAXINFER_TEST_GGUF=$gguf
export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$JAXINFER_CACHE/tests-xla}

if [ "$mode" = oracle ] || [ "$mode" = all ]; then
  JAXINFER_ORACLE_PYTHON=$("$JAXINFER_ROOT/scripts/oracle_env.sh")
  export JAXINFER_ORACLE_PYTHON
  # Other systems' quantisers, as far as they can be had; the tests of the others are skipped, and say so.
  JAXINFER_QUANTIZERS_PYTHON=$("$JAXINFER_ROOT/scripts/quantizers_env.sh") || JAXINFER_QUANTIZERS_PYTHON=
  JAXINFER_LLAMA_CPP_PYTHON=$("$JAXINFER_ROOT/scripts/bench/peers_env.sh" llama-cpp-python |
    tee /dev/stderr | awk -F '\t' '$2 == "ready" { print $4 }')
  export JAXINFER_QUANTIZERS_PYTHON JAXINFER_LLAMA_CPP_PYTHON
fi

case $mode in
  quick) marks="not slow and not full and not gpu and not root and not oracle" ;;
  slow | full) marks="$mode and not gpu and not root and not oracle" ;;
  root) marks="root and not gpu and not oracle" ;;
  oracle) marks="oracle" ;;
  all) if [ "$(id -u)" = 0 ]; then marks="not gpu"; else marks="not gpu and not root"; fi ;;
esac

if [ "$mode" = quick ] || [ "$mode" = all ]; then
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  "$bin/mypy"
fi

# Most of a test is tracing on one core. A file stays in one process, so that it shares its fixtures.
workers=${JAXINFER_TEST_WORKERS:-$("$JAXINFER_PYTHON" -c '
import os
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
print(max(1, min(4, len(os.sched_getaffinity(0)), memory // 4_000_000_000)))')}
[ "$mode" != root ] || workers=1 # they start many processes each, and measure how fast these end
parallel=()
# A worker that is lost ends the run: xdist 3.8 would hand the files that it had finished to its successor, which waits for ever for one more.
[ "$workers" = 1 ] || parallel=(-n "$workers" --dist loadfile --max-worker-restart 0)
status=0
"$JAXINFER_PYTHON" -m pytest "${parallel[@]}" -m "$marks" "$@" || status=$?
if [ "$status" = 5 ] && [ "$mode" != quick ]; then
  # A kind without any test yet is no failure; pytest's status for "no tests" is 5.
  say "There are no such tests: $marks"
  exit 0
fi
exit "$status"
