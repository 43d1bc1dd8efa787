#!/usr/bin/env bash
# The environments of the peers that scripts/bench/cpu_peers.py measures, each apart from jaxinfer's own and from the others.
set -euo pipefail

# NAME | lowest Python | highest Python | what is imported to see that it works | requirements
# transformers is the oracle's environment, which scripts/oracle_env.sh pins. gguf tells the workers what a file's tensors take.
PEERS=(
  "transformers|3.11|3.11|transformers, torch|"
  "llama-cpp-python|3.12|3.13|llama_cpp|llama-cpp-python==0.3.36 gguf==0.19.0"
  "ctranslate2|3.12|3.13|ctranslate2|ctranslate2==4.8.5 gguf==0.19.0"
  "openvino-genai|3.12|3.13|openvino_genai|openvino-genai==2026.4.1.0 gguf==0.19.0"
)

case ${1:-} in
  -h | --help | "")
    cat <<'HELP'
Usage: scripts/bench/peers_env.sh all | NAME ...

Makes an environment for each peer in $XDG_CACHE_HOME/jaxinfer/peers or ~/.cache/jaxinfer/peers (that of transformers is the oracle's,
beside it) and prints a line each: its name, and either "ready" with version and Python, or "not available" and why. One peer that
cannot be had does not keep the others from being made; the status is 0 all the same. Run again, it takes no time.

Names: transformers, llama-cpp-python, ctranslate2, openvino-genai. PyPI has llama-cpp-python as source only: it is built for this very
processor, which takes a C++ compiler and some ten minutes.
HELP
    exit 0
    ;;
  -*)
    echo "unknown option $1; see --help" >&2
    exit 2
    ;;
esac

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

# make_peer NAME LOWEST HIGHEST REQUIREMENT...: print its Python.
make_peer() {
  local name=$1 lowest=$2 highest=$3 folder=$JAXINFER_CACHE/peers/$1
  shift 3
  if [ "$name" = transformers ]; then
    "$JAXINFER_ROOT/scripts/oracle_env.sh"
    return
  fi
  if [ "$name" = llama-cpp-python ] && ! command -v c++ g++ clang++ >/dev/null; then
    say "it is built from source, and no C++ compiler (c++, g++, clang++) was found: apt-get install g++"
    return 1
  fi
  # GCC 12 takes its own _tile_loadconfig for a read of 8 bytes, and drops the stores of the rest: llama.cpp then dies where a CPU has AMX.
  local keep="-fno-dse -fno-tree-dse"
  [ "$name" != llama-cpp-python ] || local -x CMAKE_ARGS="-DCMAKE_C_FLAGS='$keep' -DCMAKE_CXX_FLAGS='$keep' ${CMAKE_ARGS:-}"
  new_env "$folder" "$lowest" "$highest" && install_once "$folder" peer.stamp "$*" "$@" && printf '%s\n' "$folder/bin/python"
}

# report NAME LOWEST HIGHEST MODULES REQUIREMENT...: make it, and print its line. What went wrong goes to stderr, its end to the line.
report() {
  local name=$1 lowest=$2 highest=$3 modules=$4 log=$JAXINFER_CACHE/peers/$1.log python versions
  shift 4
  if python=$(make_peer "$name" "$lowest" "$highest" "$@" 2> >(tee "$log" >&2)) &&
    versions=$("$python" -c "
import $modules
print(', '.join(f'{m.__name__} {m.__version__}' for m in ($modules,)))" 2> >(tee -a "$log" >&2)); then
    printf '%s\tready\t%s\t%s\n' "$name" "$versions" "$python"
  else
    sleep 0.1 # the log is written by another process
    printf '%s\tnot available\t%s\n' "$name" "$(grep . "$log" | tail -n 1)"
  fi
}

wanted=" $* "
for name in "$@"; do
  [ "$name" = all ] || printf '%s\n' "${PEERS[@]}" | grep -q "^$name|" || {
    say "there is no peer $name; see --help"
    exit 2
  }
done
mkdir -p "$JAXINFER_CACHE/peers"
for peer in "${PEERS[@]}"; do
  IFS='|' read -r name lowest highest modules requirements <<<"$peer"
  [[ $wanted == *" $name "* || $wanted == *" all "* ]] || continue
  read -ra requirements <<<"$requirements"
  report "$name" "$lowest" "$highest" "$modules" "${requirements[@]}"
done
