#!/usr/bin/env bash
# Queue teacher, export and sweep, each to start once the one before has succeeded.
#   cluster/slurm/submit_pipeline.sh
# Afterwards: python tune/select_student.py --sweep runs/sweeps/main
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

teacher=$(sbatch --parsable cluster/slurm/train_teacher.sbatch launch/configs/teacher/llama-7b.yaml)
labels=$(sbatch --parsable --dependency="afterok:$teacher" \
    cluster/slurm/export_soft_labels.sbatch launch/configs/export/llama-7b.yaml)
sweep=$(sbatch --parsable --dependency="afterok:$labels" cluster/slurm/sweep.sbatch tune/spaces/main.yaml)
echo "teacher $teacher, export $labels, sweep $sweep"
