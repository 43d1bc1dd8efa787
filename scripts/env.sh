#!/usr/bin/env bash
# Finds a Python and makes environments. Sourced by the other scripts; run by itself it makes the checkout's environment.
set -euo pipefail

JAXINFER_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
JAXINFER_CONSTRAINTS=${JAXINFER_CONSTRAINTS:-$JAXINFER_ROOT/scripts/constraints.txt}
JAXINFER_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/jaxinfer

say() { printf '%s\n' "$*" >&2; }

# no_arguments "$@" <<HELP: end with the help on stdin where it is asked for, and with status 2 at any other argument.
no_arguments() {
  case ${1:-} in
    -h | --help) cat && exit 0 ;;
    ?*) say "unknown argument $1; see --help" && exit 2 ;;
  esac
}

# runs_as PYTHON LOWEST HIGHEST: PYTHON starts, its version X.Y lies between them, and it can make environments; print its path.
# Only a start tells: the names of pyenv's shims exist for every version, and Debian's python3 may come without venv.
runs_as() {
  "$1" - "$2" "$3" 2>/dev/null <<'PYTHON'
import ensurepip, sys, venv
lowest, highest = (tuple(map(int, text.split("."))) for text in sys.argv[1:])
if not lowest <= sys.version_info[:2] <= highest:
    sys.exit(1)
print(sys.executable)
PYTHON
}

# find_python LOWEST HIGHEST: print a Python of these versions (such as 3.12 3.14), or fail saying what was looked for.
find_python() {
  local lowest=$1 highest=$2 minor candidate
  local -a candidates=()
  for ((minor = ${highest#*.}; minor >= ${lowest#*.}; minor--)); do candidates+=("python3.$minor"); done
  candidates+=(python3)
  for ((minor = ${highest#*.}; minor >= ${lowest#*.}; minor--)); do
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do candidates+=("$candidate"); done
  done
  for candidate in "${candidates[@]}"; do
    if runs_as "$candidate" "$lowest" "$highest"; then return; fi
  done
  if candidate=$(python_from_uv "$lowest") && runs_as "$candidate" "$lowest" "$highest"; then return; fi
  say "No Python from $lowest to $highest that can make environments was found: no python3.${lowest#*.} to python3.${highest#*.}, no"
  say "python3 of such a version, none of pyenv's (${PYENV_ROOT:-$HOME/.pyenv}), and uv could not fetch one."
  say "Install one, for instance with: apt-get install python$lowest python$lowest-venv   or: pyenv install $lowest"
  return 1
}

# python_from_uv VERSION: print a Python that uv has or fetches; uv itself comes from PyPI where it is not installed.
python_from_uv() {
  local version=$1 uv tools status=0
  tools=$(mktemp -d)
  uv=$(command -v uv) || {
    say "No Python $version here: trying to get one with uv from PyPI ..."
    # Any python3 with venv or pip will do for this, however old.
    if python3 -m venv "$tools/venv" >/dev/null 2>&1; then
      "$tools/venv/bin/python" -m pip install -qq --disable-pip-version-check uv >&2 || status=1
    else
      python3 -m pip install -qq --disable-pip-version-check --target "$tools/venv" uv >&2 || status=1
    fi
    uv=$tools/venv/bin/uv
  }
  if [ "$status" = 0 ]; then
    export UV_PYTHON_INSTALL_DIR=${UV_PYTHON_INSTALL_DIR:-$JAXINFER_CACHE/python}
    "$uv" python find --managed-python "$version" 2>/dev/null ||
      { "$uv" python install --no-bin "$version" >&2 && "$uv" python find --managed-python "$version"; } || status=1
  fi
  rm -rf "$tools"
  return "$status"
}

# new_env FOLDER LOWEST HIGHEST: make an environment in FOLDER, or keep the one there if its Python fits.
new_env() {
  local folder=$1 python
  if runs_as "$folder/bin/python" "$2" "$3" >/dev/null; then return; fi
  if [ -e "$folder" ]; then
    if [ ! -f "$folder/pyvenv.cfg" ]; then
      say "$folder exists and is not a Python environment: move it away, or name another folder with JAXINFER_VENV"
      return 1
    fi
    say "The environment $folder has no Python from $2 to $3 that works: making it anew"
    python=$(find_python "$2" "$3") || return
    rm -rf "$folder"
  else
    python=$(find_python "$2" "$3") || return
  fi
  say "Making the environment $folder with $("$python" --version) ..."
  "$python" -m venv "$folder"
}

# install_once FOLDER STAMP KEY REQUIREMENT...: pip-install unless the stamp says that it was done for the same KEY.
install_once() {
  local folder=$1 stamp=$1/$2 key=$3
  shift 3
  if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
  # An environment that was interrupted while it was made, or that uv made, has no pip.
  "$folder/bin/python" -m pip --version >/dev/null 2>&1 || "$folder/bin/python" -m ensurepip >/dev/null
  say "Installing ${*} (the first time takes a minute or two) ..."
  if ! "$folder/bin/python" -m pip install -qq --disable-pip-version-check -c "$JAXINFER_CONSTRAINTS" "$@" >&2; then
    say "pip could not install ${*} into $folder; see its message above. Is PyPI, or an index of your own, reachable?"
    return 1
  fi
  printf '%s\n' "$key" >"$stamp"
}

# make_env [EXTRAS]: the checkout's environment with the package installed editable. Sets JAXINFER_PYTHON.
make_env() {
  local extras=${1:-} folder=${JAXINFER_VENV:-$JAXINFER_ROOT/.venv} key
  new_env "$folder" 3.12 3.14
  folder=$(cd "$folder" && pwd)
  # The stamp holds what an installation depends on: a second run takes no time, a changed pyproject.toml or kernel installs again.
  key=$("$folder/bin/python" - "$JAXINFER_ROOT" "$JAXINFER_CONSTRAINTS" <<'PYTHON'
import hashlib, pathlib, sys
root, constraints = map(pathlib.Path, sys.argv[1:])
native = root / "pallas_kernels" / "cpu"  # compiled by the installation
files = [root / "pyproject.toml", constraints, root / "setup.py", native / "build.py", *sorted((native / "src").iterdir())]
digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
print(digest.hexdigest(), root, sys.version.split()[0])
PYTHON
  )
  install_once "$folder" "jaxinfer-${extras:-base}.stamp" "$key" -e "$JAXINFER_ROOT${extras:+[$extras]}"
  JAXINFER_PYTHON=$folder/bin/python
}

# add_deviceless: what compiles for NVIDIA GPUs that are not here: the plugins of the installed jax without the CUDA libraries that
# they would run on, and ptxas and libdevice where no toolkit is installed.
add_deviceless() {
  local folder version
  folder=$(dirname "$(dirname "$JAXINFER_PYTHON")")
  version=$("$JAXINFER_PYTHON" -c 'from importlib.metadata import version; print(version("jax"))')
  local -a packages=("jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version")
  [ -e /usr/local/cuda/nvvm/libdevice/libdevice.10.bc ] || packages+=("nvidia-cuda-nvcc<13.1" "nvidia-nvvm<13.1")
  install_once "$folder" deviceless.stamp "${packages[*]}" --no-deps "${packages[@]}"
}

# add_triton: jax-triton and the Triton that its kernels were tried with, beside a jax that it works with (200 MB).
add_triton() {
  local folder
  folder=$(dirname "$(dirname "$JAXINFER_PYTHON")")
  "$JAXINFER_PYTHON" -c 'import jax; raise SystemExit(jax.__version_info__ >= (0, 12))' || return 0
  install_once "$folder" triton.stamp "jax-triton==0.4.1 triton==3.7.1" --no-deps "jax-triton==0.4.1" "triton==3.7.1"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  case ${1:-} in
    -h | --help)
      cat <<HELP
Usage: scripts/env.sh [EXTRAS]

Makes the environment of this checkout (.venv, or the folder named by JAXINFER_VENV) with jaxinfer installed editable, and
prints its Python. EXTRAS is a comma-separated list such as test or cuda13,test. Finds Python 3.12 to 3.14 by name or among
pyenv's versions, or gets one with uv from PyPI. Run again, it only checks whether pyproject.toml or the native kernels have changed.
HELP
      exit 0
      ;;
    -*)
      say "unknown option $1; see --help"
      exit 2
      ;;
  esac
  make_env "${1:-}"
  printf '%s\n' "$JAXINFER_PYTHON"
fi
