#!/usr/bin/env bash
# Installs kdecs and what it needs into a virtual environment: launch/set_up.sh VENV. `make setup` calls it.
#
# Everything in requirements.lock is checked against its hash, also what builds a package: nothing is fetched into an
# isolated build. PyTorch is checked if torch.lock is there (`make lock-torch`): which build a machine gets (CPU, or one
# of several CUDA versions) depends on the index it comes from, and each index has wheels of its own, so that the hashes
# of one would refuse all others. TORCH_INDEX names another index for PyTorch alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1/bin/python
pin() { grep -i "^$1==" constraints.txt; }

# uv does not read pip's settings, so they are handed on: a machine behind a mirror keeps working.
setting() { "$python" -m pip config get "global.$1" 2>/dev/null | sed "s/[][',]//g" || true; }
hand_on() { # VARIABLE OF UV, VARIABLE OF PIP, SETTING OF PIP
  local value=${!1:-${!2:-$(setting "$3")}}
  [ -z "$value" ] || export "$1=$value"
}
hand_on UV_INDEX_URL PIP_INDEX_URL index-url
hand_on UV_EXTRA_INDEX_URL PIP_EXTRA_INDEX_URL extra-index-url
hand_on UV_FIND_LINKS PIP_FIND_LINKS find-links
hand_on SSL_CERT_FILE PIP_CERT cert
# Like pip, take a version from whichever index has it; the hashes make that safe.
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}

locked=$(mktemp)
trap 'rm -f "$locked"' EXIT
lock_of() { awk -v name="$1==" '/^[^ ]/ { found = index($0, name) == 1 } found' requirements.lock > "$locked"; }
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  lock_of uv
  if "$python" -m pip install --quiet --no-deps --require-hashes --requirement "$locked"; then
    uv=$1/bin/uv
  else
    echo "set_up: uv cannot be installed; pip does the same in a few minutes" >&2
  fi
fi
if [ -n "$uv" ]; then
  install() { "$uv" pip install --quiet --python "$python" "$@"; }
else
  install() { "$python" -m pip install --quiet "$@"; }
fi

# DeepSpeed is published as source alone. Its build gets the setuptools of the lock.
lock_of setuptools
install --no-deps --require-hashes --requirement "$locked"
# The lock holds all of their dependencies already, so nothing has to be resolved.
install --no-deps --no-build-isolation --require-hashes --requirement requirements.lock
if [ -f torch.lock ]; then
  install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps --require-hashes --requirement torch.lock
else
  install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt "$(pin torch)"
fi
install --no-deps --no-build-isolation --editable .
"$python" launch/prepare_extensions.py
