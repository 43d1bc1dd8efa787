#!/usr/bin/env bash
# Two nodes with eight GPUs each under Slurm: sbatch scripts/launch/slurm.sh MODEL PROMPT
#SBATCH --job-name=jaxinfer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
set -euo pipefail

if [ $# -lt 2 ] || [ "$1" = --help ]; then
  echo "Usage: sbatch scripts/launch/slurm.sh MODEL PROMPT [OPTION OF jaxinfer generate ...]"
  exit 2
fi
model=$1 prompt=$2
shift 2

# -K: a task that fails ends the others, which would wait for it. Each task finds out who it is from Slurm's variables.
# A network that is not the one of the default route: export JAXINFER_INTERFACE=ib0
exec srun -K --label jaxinfer generate "$model" --prompt "$prompt" --tp 8 --pp 2 "$@"
