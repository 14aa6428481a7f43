#!/usr/bin/env bash
# Label Studio for `make test-label-studio`, in an environment of its own: its dependencies (Django, pandas, …) are none
# of kdecs and would change kdecs' versions. tests/install_label_studio.sh DIR
set -euo pipefail
version=1.23.2
directory=$1
if [ "$("$directory/bin/python" -c 'from importlib.metadata import version; print(version("label-studio"))' 2>/dev/null)" = "$version" ]; then
  exit 0
fi
rm -rf "$directory"
uv venv --quiet --python "$(command -v python)" "$directory"
uv pip install --quiet --python "$directory/bin/python" "label-studio==$version"
