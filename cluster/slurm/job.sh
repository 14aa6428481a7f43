# Sourced by the sbatch scripts: sets the working directory and the environment, and defines what they share.

cd "${KDECS_ROOT:-$SLURM_SUBMIT_DIR}"
# shellcheck disable=SC1091
source .venv/bin/activate
# srun does not take over the CPUs per task that sbatch was given, and would bind each rank to a single core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Each line is in the job's output as soon as it is printed.
export PYTHONUNBUFFERED=1
# What the ranks of this job say of their ends. It outlives a restart of the job.
export KDECS_JOB_DIR=$PWD/runs/.slurm-$SLURM_JOB_ID

# The first node of the job, and a port that no other job on that node uses.
first_node() {
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${nodes%%$'\n'*}"
}
job_port() { echo $((20000 + SLURM_JOB_ID % 20000)); }

# Run a step, whose ranks rank.sh starts, and queue the job again if the same command resumes what was done so far: after
# SIGTERM (preemption, or a time limit that is near) once the state is saved, and after the loss of a node. The exit code
# cannot say so. srun has 143 for a stop and for a rank that it ended itself because another one had failed.
run_and_requeue() {
    local status=0 said num_stops
    mkdir -p "$KDECS_JOB_DIR"
    rm -f "$KDECS_JOB_DIR"/{resumable,failed,pid,ray}-* "$KDECS_JOB_DIR/over"
    "$@" || status=$?
    if ((status == 0)); then
        rm -rf "$KDECS_JOB_DIR"
        return 0
    fi
    said=$(sort -u "$KDECS_JOB_DIR"/resumable-* 2>/dev/null || true)
    if [[ -z $said ]] || compgen -G "$KDECS_JOB_DIR/failed-*" >/dev/null; then
        give_up "$status" "failed; its error is above. The same sbatch command resumes it"
    fi
    # A stop costs the time to start again, so a job that gets no further between its stops must end some day.
    num_stops=1
    if [[ $said == "$(cat "$KDECS_JOB_DIR/said" 2>/dev/null)" ]]; then
        num_stops=$(($(<"$KDECS_JOB_DIR/num_stops") + 1))
    fi
    echo "$said" >"$KDECS_JOB_DIR/said"
    echo "$num_stops" >"$KDECS_JOB_DIR/num_stops"
    if ((num_stops >= 10)); then
        give_up "$status" "was stopped $num_stops times without getting any further; give it more time (sbatch --time)"
    fi
    if [[ $(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then # not cancelled meanwhile
        echo "job $SLURM_JOB_ID can be resumed, and is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}

give_up() {
    echo "job $SLURM_JOB_ID is not queued again: it $2. Jobs that depend on it are cancelled." >&2
    rm -rf "$KDECS_JOB_DIR"
    exit $(($1 == 143 ? 1 : $1)) # 143 would say that it was stopped
}
