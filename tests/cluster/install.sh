#!/usr/bin/env bash
# What the tests in tests/cluster need, on Debian or Ubuntu, as root: Slurm, munge, an ssh server and pdsh. The tests
# start their daemons themselves, so those that the packages would start are left out.
set -euo pipefail
refuse() {
  echo "install.sh: $1; the cluster tests are left out" >&2
  exit 1
}
[[ $EUID -eq 0 ]] || refuse "expected root, found user $EUID"
# Before anything is installed, since without namespaces it would be of no use.
unshare --net --uts --ipc --pid --mount --fork true 2>/dev/null || refuse "expected a machine that allows namespaces"
if type -P slurmctld slurmd munged sshd pdsh rsync ip >/dev/null; then exit 0; fi
type -P apt-get >/dev/null || refuse "expected apt-get (Debian or Ubuntu), or slurmctld, munged, sshd, pdsh, rsync and ip"
policy=/usr/sbin/policy-rc.d # what Debian's packages ask before they start a service
log=$(mktemp)
made=("$log")
trap 'rm -f "${made[@]}"' EXIT
if [[ ! -e $policy ]]; then
  made+=("$policy")
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
# CI may have no network, or another program may be installing.
reach=(-o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1 -o DPkg::Lock::Timeout=60)
if ! { apt-get "${reach[@]}" update -qq && DEBIAN_FRONTEND=noninteractive apt-get "${reach[@]}" install -y -qq \
  --no-install-recommends slurm-wlm munge openssh-server openssh-client pdsh rsync iproute2 procps; } >"$log" 2>&1; then
  refuse "apt-get could not install Slurm, munge, an ssh server and pdsh ($(grep -m 1 '^E: ' "$log" || tail -n 1 "$log"))"
fi
