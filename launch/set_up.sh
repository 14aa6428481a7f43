#!/usr/bin/env bash
# Installs kdecs and what it needs into a virtual environment: launch/set_up.sh VENV. `make setup` calls it.
#
# Everything is checked against the hashes in requirements.lock and torch.lock, also what builds a package: nothing is
# fetched into an isolated build. torch.lock knows PyTorch's usual build and a CPU build. TORCH_INDEX names an index with
# another build. Its wheels differ, so they are checked only once `make lock-torch TORCH_INDEX=...` has recorded their
# hashes in torch-index.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1/bin/python
pin() { grep -i "^$1==" constraints.txt; }

# uv does not read pip's settings, so they are handed on: a machine behind a mirror keeps working.
# `pip config get` would look into the user's file alone, and a mirror is often set for the whole machine.
setting() { "$python" -m pip config list 2>/dev/null | sed -n "s/^global[.]$1=//p" | sed "s/[][',]//g; s/\\\\n/ /g" || true; }
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
# Like pip, compile what is installed. Containers often set PYTHONDONTWRITEBYTECODE, and then each start of a process
# would compile PyTorch anew.
export UV_COMPILE_BYTECODE=${UV_COMPILE_BYTECODE:-1}

locked=$(mktemp)
trap 'rm -f "$locked"' EXIT
# The entries of requirements.lock (or another file) whose first line matches a pattern.
lock_of() { awk -v start="$1" '/^[^ ]/ { found = $0 ~ start } found' "${2:-requirements.lock}" > "$locked"; }
uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  lock_of "^uv=="
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
lock_of "^setuptools=="
install --no-deps --require-hashes --requirement "$locked"
# The lock holds all of their dependencies already, so nothing has to be resolved.
install --no-deps --no-build-isolation --require-hashes --requirement requirements.lock

torch() { # PATTERN OF THE LOCK'S ENTRIES, LOCK: all that PyTorch needs and requirements.lock does not have
  lock_of "$1" "$2"
  install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps --require-hashes --requirement "$locked"
}
if [ -z "${TORCH_INDEX:-}" ]; then
  # Like a resolver, take the CPU build where one of the configured places has it. Either way the hash decides.
  torch '^torch==.*[+]cpu' torch.lock 2>/dev/null || torch '^(torch==[^+]*$|[^t]|triton)' torch.lock || {
    echo "set_up: no build of PyTorch in torch.lock is to be had here; name the index of yours with TORCH_INDEX," \
      "or record what is here with make lock-torch" >&2
    exit 1
  }
elif [ -f torch-index.lock ]; then
  torch . torch-index.lock
else
  echo "set_up: PyTorch comes from TORCH_INDEX unchecked; make lock-torch TORCH_INDEX=... records its hashes" >&2
  install --index-url "$TORCH_INDEX" --constraint constraints.txt "$(pin torch)"
fi
install --no-deps --no-build-isolation --editable .
