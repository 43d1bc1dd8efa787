#!/usr/bin/env bash
# What only a GPU can tell: the numbers of the compiled kernels, and their speed as percent of the card's peak.
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  cat <<'HELP'
Usage: scripts/gpu_check.sh [FOLDER]

On a machine with an NVIDIA GPU, in an environment with jax[cuda12] or jax[cuda13] (scripts/env.sh cuda13,test makes one): runs the kernel
tests compiled instead of interpreted and the tests marked gpu, then times every kernel (scripts/bench/kernel_report.py --measure), and
the INT4 matmuls of a decoding Llama-3.1-8B with tiles that are tuned beside the defaults (jaxinfer tune). Writes tests.txt, kernels.txt,
kernels.json, tuned.txt and the tuned tiles to FOLDER, build/gpu_check by default. PYTHON names the interpreter, python3 by default.
HELP
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
folder=${1:-build/gpu_check}
mkdir -p "$folder"
export JAX_PLATFORMS=cuda,cpu PYTHONPATH=.:scripts/bench XLA_PYTHON_CLIENT_PREALLOCATE=false

"$python" - <<'PY'
import sys

import jax

device = jax.devices()[0]
if device.platform != "gpu":
    sys.exit(f"the device here is a {device.platform}; scripts/bench/kernel_report.py without --measure needs no GPU")
print(device.device_kind)
PY

status=0
"$python" -m pytest -q -p no:cacheprovider -m "not slow and not full and not root and not oracle" \
  tests/pallas_kernels/test_*_kernels.py tests/pallas_kernels/test_quant_matmul_*.py -k "not compile" 2>&1 | tee "$folder/tests.txt" || status=$?
"$python" -m pytest -q -p no:cacheprovider -m gpu tests 2>&1 | tee -a "$folder/tests.txt" || { code=$?; [ "$code" = 5 ] || status=$code; }
"$python" scripts/bench/kernel_report.py --measure --json >"$folder/kernels.json" 2> >(tee "$folder/kernels.txt" >&2) || status=$?
# once with what is in the user's cache folder would compare tuned with tuned
XDG_CACHE_HOME=$folder/cache "$python" -m jaxinfer tune --op quant_matmul --dtype bfloat16 --quantize w4a16-g128 --prompt-tokens 16 \
  --output "$folder/tuned" 2>&1 | tee "$folder/tuned.txt" || status=$?
exit "$status"
