#!/usr/bin/env bash
# What only a GPU can tell: the numbers of the compiled kernels, their speed as percent of the card's peak, and that of a whole model.
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
Usage: scripts/gpu_check.sh [--dry-run] [FOLDER]

On a machine with an NVIDIA GPU, in an environment with jax[cuda12] or jax[cuda13] (scripts/env.sh cuda13,test makes one), in under ten
minutes: runs the kernel tests compiled instead of interpreted and the tests marked gpu; times a decoding Llama-3.1-8B with random weights
in bfloat16, INT8 and INT4 (scripts/bench/gpu_decode.py); times every kernel beside XLA, cuDNN and torch
(scripts/bench/kernel_report.py --measure); and the INT4 matmuls of that model with tiles that are tuned beside the defaults (jaxinfer
tune). Each part has a limit of time, after which the next one begins. Writes tests.txt, decode.txt, decode.json, kernels.txt, kernels.json,
gpu_check.png, tuned.txt and the tuned tiles to FOLDER, build/gpu_check by default. Ends with 0 where every part did.
  --dry-run             the same parts on any machine, with what is small, interpreted: whether they run, and no more
  PYTHON=...            the interpreter, python3 by default
  TORCH_PYTHON=...      one that has torch, PYTHON by default
HELP
  exit 0
fi

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=--dry-run
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
folder=${1:-build/gpu_check}
mkdir -p "$folder"
export PYTHONPATH=.:scripts/bench XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=cuda,cpu
[ -z "$dry" ] || export JAX_PLATFORMS=cpu

"$python" - $dry <<'PY'
import sys

import jax

device = jax.devices()[0]
if device.platform != "gpu" and "--dry-run" not in sys.argv:
    sys.exit(f"the device here is a {device.platform}; scripts/bench/kernel_report.py without --measure needs no GPU, nor does --dry-run")
print(device.device_kind)
PY

status=0
# part SECONDS FILE COMMAND...: its output goes to the terminal and to FILE
part() {
  local limit=$1 file=$2 code=0
  shift 2
  timeout "$limit" "$@" 2>&1 | tee -a "$folder/$file" || code=$?
  [ "$code" != 124 ] || echo "$file: stopped after $limit seconds" | tee -a "$folder/$file"
  [ "$code" = 0 ] || status=$code
}
rm -f "$folder"/{tests,decode,kernels,tuned}.txt

tests=("$python" -m pytest -q -p no:cacheprovider)
kernel_tests=(tests/pallas_kernels/test_*_kernels.py tests/pallas_kernels/test_*_mosaic.py tests/pallas_kernels/test_quant_matmul_*.py)
kernel_tests+=(tests/pallas_kernels/test_{activation,cross_entropy,dropout,latent_attention,moe,quantize_weights,softmax,triangle_attention}.py)
if [ -n "$dry" ]; then
  tests+=(--collect-only)
fi
part 150 tests.txt "${tests[@]}" -m "not slow and not full and not root and not oracle and not aot" "${kernel_tests[@]}"
part 45 tests.txt "${tests[@]}" -m gpu tests/pallas_kernels
if [ -n "$dry" ]; then
  part 120 decode.txt "$python" scripts/bench/gpu_decode.py --dry-run --prompt 8 --tokens 9 --json "$folder/decode.json"
else
  part 150 decode.txt "$python" scripts/bench/gpu_decode.py --json "$folder/decode.json"
fi
part 160 kernels.txt bash -c '"$1" scripts/bench/kernel_report.py --measure --limit 140 --json $2 >"$3/kernels.json"' - "$python" "$dry" "$folder"
part 20 decode.txt "$python" scripts/bench/gpu_chart.py "$folder"
if [ -z "$dry" ]; then
  # once with what is in the user's cache folder would compare tuned with tuned
  XDG_CACHE_HOME=$folder/cache part 55 tuned.txt "$python" -m jaxinfer tune --op quant_matmul --dtype bfloat16 --quantize w4a16-g128 \
    --prompt-tokens 16 --output "$folder/tuned"
fi
exit "$status"
