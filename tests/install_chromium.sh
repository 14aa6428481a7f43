#!/usr/bin/env bash
# Chromium and its driver for `make test-browser`, on Debian or Ubuntu, as root:
# tests/install_chromium.sh [PYTHON]. The driver is a package for that Python and comes without a browser.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
"${1:-python}" -m pip install --quiet playwright==1.65.2
command -v chromium
