#!/usr/bin/env bash
# PostgreSQL for tests/sweep/test_postgres.py, on Debian or Ubuntu, as root. The test starts a server of its own;
# the one that the package would start is left out.
set -euo pipefail
mkdir -p /etc/postgresql-common
printf 'create_main_cluster = false\n' >/etc/postgresql-common/createcluster.conf
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >/dev/null
ls -d /usr/lib/postgresql/*/bin
