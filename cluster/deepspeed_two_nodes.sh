#!/usr/bin/env bash
# Train a teacher on the first two nodes of cluster/hostfile with DeepSpeed's launcher.
#
#   cluster/deepspeed_two_nodes.sh [CONFIG [--set KEY=VALUE …]]
#
# By default pdsh starts the ranks over ssh, from any node. Without ssh between the nodes, run it on each of them with
# NODE_RANK=0 and NODE_RANK=1. The repository, its .venv and the run directory must be at the same path on both.
# HOSTFILE, MASTER_PORT and SCRIPT (such as launch/export_soft_labels.py) can be set in the environment.
# Ctrl-C, SIGTERM and SIGHUP stop the ranks with their state saved; it then ends with exit code 143. If a node is lost,
# take its line out of the hostfile and run the same command on the other one: it resumes there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

hostfile=${HOSTFILE:-cluster/hostfile}
script=${SCRIPT:-launch/train_teacher.py}
config=${1:-launch/configs/teacher/llama-7b.yaml}
port=${MASTER_PORT:-29500}
first_node=$(awk '!/^[[:space:]]*#/ && NF { print $1; exit }' "$hostfile")

without_ssh=()
if [[ -n ${NODE_RANK:-} ]]; then
    without_ssh=(--no_ssh --node_rank "$NODE_RANK")
fi
command=(deepspeed --hostfile "$hostfile" --num_nodes 2 --master_addr "$first_node" --master_port "$port"
    "${without_ssh[@]}" "$script" --config "$config" "${@:2}")
[[ -z ${NODE_RANK:-} ]] || exec "${command[@]}"

# TCP alone would wait for hours for a node that has lost its power.
alive="-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $alive"

# DeepSpeed's own way to stop is to end pdsh and to give the ranks 30 s. So it gets neither the terminal's Ctrl-C nor
# other signals: a rank of the first node does, tells the others, and all of them end once their state is saved.
stop() {
    interrupted=1
    trap 'interrupted=1; kill -TERM "$launcher"' INT TERM HUP # the second time, DeepSpeed's own way
    echo "stopping: the ranks save their state at the end of this step" >&2 || true
    # shellcheck disable=SC2086,SC2029
    ssh -o ConnectTimeout=10 $alive "$first_node" "pkill -TERM -o -P \
        \$(pgrep -d, -f '^[^ ]+ -u -m deepspeed\.launcher\.launch .*--master_port=$port ')" || kill -TERM "$launcher"
}
setsid "${command[@]}" &
launcher=$!
trap stop INT TERM HUP
while true; do
    interrupted="" status=0
    wait "$launcher" || status=$? # a signal ends the wait, but not the launcher
    [[ -n $interrupted ]] || exit "$status"
done
