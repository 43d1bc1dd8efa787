#!/usr/bin/env bash
# The environment of the oracle that golden tests are made with: transformers on torch, apart from jaxinfer's own.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
no_arguments "$@" <<'HELP'
Usage: scripts/oracle_env.sh

Makes an environment with transformers and torch for the CPU in $XDG_CACHE_HOME/jaxinfer/oracle or ~/.cache/jaxinfer/oracle and
prints its Python. Needs a Python 3.11, found like that of scripts/env.sh. Run again, it takes no time.
HELP

folder=$JAXINFER_CACHE/oracle
# torch exactly so, and on 3.11: PyPI has a CPU build for that; any other request brings gigabytes of CUDA packages.
requirements=(torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 tokenizers==0.23.3 safetensors==0.8.0 gguf==0.19.0)
JAXINFER_CONSTRAINTS=/dev/null # those are for jaxinfer's Pythons: their numpy does not exist for 3.11
mkdir -p "$JAXINFER_CACHE"
new_env "$folder" 3.11 3.11
install_once "$folder" oracle.stamp "${requirements[*]}" "${requirements[@]}"
printf '%s\n' "$folder/bin/python"
