#!/usr/bin/env bash
# Queue teacher, export and sweep, each to start once the one before has succeeded. If one fails, Slurm cancels the jobs
# after it; the same command then goes on from what is complete.
#   cluster/slurm/submit_pipeline.sh [TEACHER [EXPORT [SPACE]]]      configs, as names of files
# Options that only one of the jobs needs are in TEACHER_SBATCH, EXPORT_SBATCH and SWEEP_SBATCH. Those for all of them
# are in Slurm's own variables, such as SBATCH_PARTITION and SBATCH_GPUS_PER_NODE (docs/cluster.md).
# Afterwards: python tune/select_student.py --sweep runs/sweeps/main
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

submit() { # OPTIONS AFTER SCRIPT CONFIG
    local options
    read -ra options <<<"$1"
    [[ -z $2 ]] || options+=("--dependency=afterok:$2" --kill-on-invalid-dep=yes)
    sbatch --parsable "${options[@]}" "cluster/slurm/$3" "$4" | cut -d ';' -f 1 # without the name of a cluster
}
teacher=$(submit "${TEACHER_SBATCH:-}" "" train_teacher.sbatch "${1:-launch/configs/teacher/llama-7b.yaml}")
labels=$(submit "${EXPORT_SBATCH:-}" "$teacher" export_soft_labels.sbatch "${2:-launch/configs/export/llama-7b.yaml}")
sweep=$(submit "${SWEEP_SBATCH:-}" "$labels" sweep.sbatch "${3:-tune/spaces/main.yaml}")
echo "teacher $teacher, export $labels, sweep $sweep"
