#!/usr/bin/env bash
# Start one rank of an srun step, with Slurm's rank variables under the names that kdecs and torch read.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
