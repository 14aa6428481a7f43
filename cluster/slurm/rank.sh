#!/usr/bin/env bash
# Start one rank of an srun step, with Slurm's rank variables under the names that kdecs and torch read.
#
# The rank's end is noted in KDECS_JOB_DIR, where job.sh looks. resumable-RANK is there as long as the same command loses
# nothing: kdecs removes the file (KDECS_RESUMABLE_FILE) once it has work to save, and writes it once that is saved.
# failed-RANK is there if the rank failed by itself. After the loss of a node there is neither.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export KDECS_RESUMABLE_FILE=$KDECS_JOB_DIR/resumable-$RANK

begins="stopped before it began"
echo "$begins" >"$KDECS_RESUMABLE_FILE"
"$@" &
child=$! status=0
echo $$ >"$KDECS_JOB_DIR/pid-$RANK"
trap 'kill -TERM "$child" 2>/dev/null || true' TERM
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # the signal interrupted `wait`
    status=0
    wait "$child" || status=$?
done
if ((status != 0 && status != 143)) && [[ $(cat "$KDECS_RESUMABLE_FILE" 2>/dev/null) == "$begins" ]]; then
    rm -f "$KDECS_RESUMABLE_FILE"
fi
[[ $status -eq 0 || -e $KDECS_RESUMABLE_FILE ]] || echo "$status" >"$KDECS_JOB_DIR/failed-$RANK"
exit "$status"
