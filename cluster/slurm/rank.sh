#!/usr/bin/env bash
# Start one rank of an srun step: Slurm's rank state under the names that kdecs (and torch) reads.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$@"
