#!/usr/bin/env bash
# Train a teacher on the first two nodes of cluster/hostfile with DeepSpeed's launcher.
#
#   cluster/deepspeed_two_nodes.sh [CONFIG [--set KEY=VALUE …]]
#
# By default pdsh starts the ranks over ssh, from any node. Without ssh between the nodes, run it on each of them with
# NODE_RANK=0 and NODE_RANK=1. The repository, its .venv and the run directory must be at the same path on both.
# HOSTFILE, MASTER_PORT and SCRIPT (such as launch/export_soft_labels.py) can be set in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

hostfile=${HOSTFILE:-cluster/hostfile}
script=${SCRIPT:-launch/train_teacher.py}
config=${1:-launch/configs/teacher/llama-7b.yaml}
first_node=$(awk '!/^[[:space:]]*#/ && NF { print $1; exit }' "$hostfile")

without_ssh=()
if [[ -n ${NODE_RANK:-} ]]; then
    without_ssh=(--no_ssh --node_rank "$NODE_RANK")
fi
exec deepspeed --hostfile "$hostfile" --num_nodes 2 \
    --master_addr "$first_node" --master_port "${MASTER_PORT:-29500}" \
    "${without_ssh[@]}" \
    "$script" --config "$config" "${@:2}"
