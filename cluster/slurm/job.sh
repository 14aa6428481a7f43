# Sourced by the sbatch scripts: sets the working directory and the environment, and defines what they share.

cd "${KDECS_ROOT:-$SLURM_SUBMIT_DIR}"
# shellcheck disable=SC1091
source .venv/bin/activate

# The first node of the job, and a port that no other job on that node uses.
first_node() {
    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${nodes%%$'\n'*}"
}
job_port() { echo $((20000 + SLURM_JOB_ID % 20000)); }

# Run a step. Exit code 143 means that it saved its state after SIGTERM (preemption, or a time limit that is near):
# the job is then queued again.
run_and_requeue() {
    local status=0
    "$@" || status=$?
    if [[ $status -eq 143 ]]; then
        echo "stopped with its state saved, queued again: job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
