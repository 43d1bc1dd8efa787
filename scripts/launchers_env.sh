#!/usr/bin/env bash
# Installs what the tests of real launches start. For Debian and Ubuntu, as root.
set -euo pipefail

# what each package is for: mpirun; srun and its servers; ssh to this machine; network namespaces and slow links
packages=(openmpi-bin munge slurmctld slurmd slurm-client openssh-client openssh-server iproute2)
programs=(mpirun munged slurmctld slurmd srun ssh sshd ip tc)

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
no_arguments "$@" <<<"Usage: scripts/launchers_env.sh    installs ${packages[*]} where one of ${programs[*]} is missing"

PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${programs[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  say "not here: ${missing[*]}; they are installed by root, with apt-get"
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2
apt-get install -qq -y --no-install-recommends "${packages[@]}" >&2
