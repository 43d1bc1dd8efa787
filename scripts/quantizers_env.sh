#!/usr/bin/env bash
# The environment of other systems' quantisers, whose checkpoints are read and which read what is exported here; apart from jaxinfer's.
set -euo pipefail

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
no_arguments "$@" <<'HELP'
Usage: scripts/quantizers_env.sh

Makes an environment in $XDG_CACHE_HOME/jaxinfer/quantizers or ~/.cache/jaxinfer/quantizers with transformers on torch for the CPU and the
quantisers that can be had, one after the other, and prints its Python. What cannot be installed or imported is said on stderr and left
out; the tests of it are skipped. Needs a Python 3.11, found like that of scripts/env.sh. Run again, it takes no time.
HELP

folder=$JAXINFER_CACHE/quantizers
# torch as in scripts/oracle_env.sh, for the same reason. NAME | what is imported | requirements; a later one must fit the earlier ones.
BASE=(torch==2.13.0 numpy==2.2.6 gguf==0.19.0) # numpy as GPTQModel pins it
QUANTIZERS=(
  "llm-compressor|llmcompressor, compressed_tensors|llmcompressor==0.14.0.1"
  "gptqmodel|gptqmodel|gptqmodel==7.6.0"
  "bitsandbytes|bitsandbytes|bitsandbytes==0.50.2"
  "torchao|torchao|torchao==0.18.0"
  "optimum-quanto|optimum.quanto|optimum-quanto==0.2.7"
)
mkdir -p "$JAXINFER_CACHE"
new_env "$folder" 3.11 3.11
JAXINFER_CONSTRAINTS=/dev/null # those are for jaxinfer's Pythons
install_once "$folder" base.stamp "${BASE[*]}" "${BASE[@]}"
JAXINFER_CONSTRAINTS=$folder/constraints.txt
for quantizer in "${QUANTIZERS[@]}"; do
  IFS='|' read -r name modules requirements <<<"$quantizer"
  read -ra requirements <<<"$requirements"
  "$folder/bin/python" -m pip freeze --disable-pip-version-check >"$JAXINFER_CONSTRAINTS"
  if ! install_once "$folder" "$name.stamp" "${requirements[*]}" "${requirements[@]}"; then
    say "$name is left out: it does not install"
  elif ! "$folder/bin/python" -c "import $modules" >/dev/null 2>"$folder/$name.log"; then
    say "$name is left out: $(grep . "$folder/$name.log" | tail -n 1)"
  fi
done
printf '%s\n' "$folder/bin/python"
