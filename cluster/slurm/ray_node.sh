#!/usr/bin/env bash
# Start Ray on one node of a job, and on the first node a command beside it, with whose end Ray ends on all of them.
#   srun cluster/slurm/ray_node.sh ADDRESS COMMAND…
# The command need not wait for the other nodes: Ray gives it their CPUs and GPUs once they have joined.
set -euo pipefail
address=$1
over=$KDECS_JOB_DIR/over # on the file system that all nodes share
options=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)

if [[ $SLURM_PROCID -ne 0 ]]; then
    for _ in {1..20}; do # the first node may still be starting
        if ray start --address "$address" "${options[@]}" >"$KDECS_JOB_DIR/ray-$SLURM_PROCID" 2>&1; then
            while [[ ! -e $over ]]; do sleep 1; done
            ray stop >/dev/null 2>&1 || true
            exit 0
        fi
        [[ ! -e $over ]] || exit 0
        sleep 5
    done
    cat "$KDECS_JOB_DIR/ray-$SLURM_PROCID"
    echo "Ray does not start on $HOSTNAME (its message is above); the sweep goes on without this node" >&2
    exit 0
fi

# The address under which the other nodes know this one. A node's own name may be a loopback address in its /etc/hosts.
host=${address%:*}
ip=$(getent ahostsv4 "$host" | awk '$1 !~ /^127/ { print $1; exit }')
ip=${ip:-$(hostname -I | awk '{ print $1 }')}
export RAY_ADDRESS=$ip:${address##*:}
# A dashboard would be one more port through which code can be run.
if ! ray start --head --node-ip-address "$ip" --port "${address##*:}" --include-dashboard=false "${options[@]}" \
    >"$KDECS_JOB_DIR/ray-0" 2>&1; then
    cat "$KDECS_JOB_DIR/ray-0"
    echo "Ray does not start on $HOSTNAME; its message is above" >&2
    echo 1 >"$KDECS_JOB_DIR/failed-0"
    exit 1
fi
status=0
# The command is one process, whatever the number of the step's tasks.
SLURM_LOCALID=0 SLURM_NTASKS=1 cluster/slurm/rank.sh "${@:2}" || status=$?
touch "$over"
ray stop >/dev/null 2>&1 || true
exit "$status"
