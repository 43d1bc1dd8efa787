#!/usr/bin/env bash
# Open MPI 4 or 5 over the hosts of a file: scripts/launch/mpirun.sh HOSTFILE PROCESSES MODEL PROMPT
set -euo pipefail

if [ $# -lt 4 ] || [ "$1" = --help ]; then
  echo "Usage: scripts/launch/mpirun.sh HOSTFILE PROCESSES MODEL PROMPT [OPTION OF jaxinfer generate ...]"
  echo "The first host of the file is the coordinator's; JAXINFER_PORT is its port (62200)."
  exit 2
fi
hostfile=$1 processes=$2 model=$3 prompt=$4
shift 4

# Open MPI 5 does not tell processes where the first one is, so that is given. No binding: XLA's threads need more than a core.
first=$(awk '!/^[[:space:]]*(#|$)/ { print $1; exit }' "$hostfile")
exec mpirun -n "$processes" --hostfile "$hostfile" --bind-to none \
  -x JAXINFER_COORDINATOR="$first:${JAXINFER_PORT:-62200}" -x PATH -x PYTHONPATH \
  jaxinfer generate "$model" --prompt "$prompt" "$@"
