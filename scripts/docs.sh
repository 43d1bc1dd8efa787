#!/usr/bin/env bash
# Write the API reference, from the docstrings, and the generated pages of docs/.
set -euo pipefail

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  echo "Usage: scripts/docs.sh    writes build/reference/index.html (with pdoc) and brings docs/support.md and docs/errors.md up to date"
  exit 0
fi

# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_env docs
cd "$JAXINFER_ROOT"
export JAX_PLATFORMS=cpu
"$JAXINFER_PYTHON" scripts/make_docs.py
"$JAXINFER_PYTHON" scripts/make_docs.py --reference build/reference
say "The reference is in $JAXINFER_ROOT/build/reference/index.html"
