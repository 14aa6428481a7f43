#!/usr/bin/env bash
# PostgreSQL for tests/sweep/test_postgres.py, on Debian or Ubuntu, as root. The test starts a server of its own;
# the one that the package would start is left out.
set -euo pipefail
refuse() {
  echo "install_postgres.sh: $1; the tests on PostgreSQL are left out" >&2
  exit 1
}
if compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then exit 0; fi
[[ $EUID -eq 0 ]] || refuse "expected root, found user $EUID"
type -P apt-get >/dev/null || refuse "expected apt-get (Debian or Ubuntu), or PostgreSQL's programs in /usr/lib/postgresql"
mkdir -p /etc/postgresql-common
printf 'create_main_cluster = false\n' >/etc/postgresql-common/createcluster.conf
# CI may have no network, or another program may be installing.
reach=(-o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=60)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get "${reach[@]}" update -qq && DEBIAN_FRONTEND=noninteractive apt-get "${reach[@]}" install -y -qq \
  --no-install-recommends postgresql; } >"$log" 2>&1; then
  refuse "apt-get could not install PostgreSQL ($(grep -m 1 '^E: ' "$log" || tail -n 1 "$log"))"
fi
