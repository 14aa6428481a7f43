# Sourced by the sbatch scripts: the working directory, the environment, and what to do after a stop.

cd "${KDECS_ROOT:-$SLURM_SUBMIT_DIR}"
# shellcheck disable=SC1091
source .venv/bin/activate

# The first node of the job, and a port that two jobs on one node do not share.
first_node() {
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${nodes%%$'\n'*}"
}
job_port() { echo $((20000 + SLURM_JOB_ID % 20000)); }

# Run a step; 143 means that it saved its state after SIGTERM (time limit near, preempted): queue the job again.
run_and_requeue() {
    local status=0
    "$@" || status=$?
    if [[ $status -eq 143 ]]; then
        echo "stopped with its state saved, queued again: job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
