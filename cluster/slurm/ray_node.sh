#!/usr/bin/env bash
# Start Ray on one node of a job, and on the first node a command beside it, with whose end Ray ends on all of them.
#   srun cluster/slurm/ray_node.sh ADDRESS COMMAND…
# The command need not wait for the other nodes: Ray gives it their CPUs and GPUs once they have joined.
set -euo pipefail
address=$1
over=$KDECS_JOB_DIR/over # on the file system that all nodes share
options=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats)
log=$KDECS_JOB_DIR/ray-$SLURM_PROCID

# Start Ray in so many tries, since it gives its servers half a minute, which are few on a busy node or file system.
start_ray() { # TRIES OPTION…
    local try
    for ((try = 1; try <= $1; try++)); do
        if ray start "${@:2}" "${options[@]}" >"$log" 2>&1; then return 0; fi
        ray stop >/dev/null 2>&1 || true # what the try has left
        [[ ! -e $over ]] || return 1
        sleep 5
    done
    cat "$log"
    echo "Ray does not start on $HOSTNAME; its message is above" >&2
    return 1
}

if [[ $SLURM_PROCID -ne 0 ]]; then
    if start_ray 20 --address "$address"; then # the first node may still be starting
        while [[ ! -e $over ]]; do sleep 1; done
        ray stop >/dev/null 2>&1 || true
    fi
    exit 0 # the sweep goes on without a node on which Ray does not start
fi

# The address under which the other nodes know this one. A node's own name may be a loopback address in its /etc/hosts.
host=${address%:*}
ip=$(getent ahostsv4 "$host" | awk '$1 !~ /^127/ { print $1; exit }')
ip=${ip:-$(hostname -I | awk '{ print $1 }')}
export RAY_ADDRESS=$ip:${address##*:}
# A dashboard would be one more port through which code can be run.
if ! start_ray 3 --head --node-ip-address "$ip" --port "${address##*:}" --include-dashboard=false; then
    echo 1 >"$KDECS_JOB_DIR/failed-0"
    exit 1
fi
status=0
# The command is one process, whatever the number of the step's tasks.
SLURM_LOCALID=0 SLURM_NTASKS=1 cluster/slurm/rank.sh "${@:2}" || status=$?
touch "$over"
ray stop >/dev/null 2>&1 || true
exit "$status"
