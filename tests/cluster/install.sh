#!/usr/bin/env bash
# What the tests in tests/cluster need, on Debian or Ubuntu, as root: Slurm, munge, an ssh server and pdsh. The tests
# start their daemons themselves, so those that the packages would start are left out.
set -euo pipefail
[[ $EUID -eq 0 ]] || { echo "install.sh: expected root, found user $EUID; the cluster tests skip without Slurm" >&2; exit 1; }
if type -P slurmctld slurmd munged sshd pdsh rsync ip >/dev/null; then exit 0; fi
policy=/usr/sbin/policy-rc.d # what Debian's packages ask before they start a service
if [[ ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
reach=(-o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1) # CI may have no network
apt-get "${reach[@]}" update -qq
DEBIAN_FRONTEND=noninteractive apt-get "${reach[@]}" install -y -qq --no-install-recommends \
  slurm-wlm munge openssh-server openssh-client pdsh rsync iproute2 procps >/dev/null
type -P slurmctld slurmd munged sshd pdsh
