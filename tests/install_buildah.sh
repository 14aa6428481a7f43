#!/usr/bin/env bash
# What tests/cluster/test_image.py needs, on Debian or Ubuntu, as root: buildah, and debootstrap for the image to build on.
set -euo pipefail
if type -P buildah debootstrap >/dev/null; then exit 0; fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends buildah crun debootstrap >/dev/null
type -P buildah debootstrap
