# What the job scripts of this folder share; they source it.
#
#   launch launch/sft.py recipes/alpaca.yaml [key=value ...]    one process per task of the job, on all its nodes
#   launch_locally OUTPUT FOLDER NAME launch/sft.py ...         the same, with the run written to a node's own disk
#
# PYTHON is the interpreter: by default python, as the shell found it in which sbatch was called. sbatch hands that
# shell's environment on, HF_TOKEN included, which so stands in no script.

PYTHON=${PYTHON:-python}
here=$(dirname "${BASH_SOURCE[0]}")
# of a task in an array, whose plain number may mean the whole array
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
trap : TERM USR1 # this script waits for its step to end, and then for its turn; the ranks save

# launch PROGRAM ARGUMENT...: run it, and go back into the queue where it was stopped with a checkpoint.
launch() {
    run_step "$@"
    local status=$?
    requeue_if_stopped $status "$@"
    return $status
}

# launch_locally OUTPUT FOLDER NAME PROGRAM ARGUMENT...: the run NAME of the shared folder OUTPUT is fetched to FOLDER on
# this node's own disk (a job that is started again may be on another node), goes on there, and is brought back whenever
# it ends. One node only: ranks on others could not read its checkpoints. What a node that dies has not brought is lost.
launch_locally() {
    local output=$1 folder=$2/slurm-$SLURM_JOB_ID name=$3 status
    shift 3
    if [[ $SLURM_JOB_NUM_NODES -ne 1 ]]; then
        echo "error: output on a node's own disk is for jobs of one node; this one has $SLURM_JOB_NUM_NODES" >&2
        return 2
    fi
    mkdir -p "$output" "$folder" || return 2
    [[ -d $output/$name || ! -d $output/.$name.old ]] || mv "$output/.$name.old" "$output/$name" # ended in bring
    bring "$output" "$folder" "$name" || return 2
    run_step "$@" "output=$folder"
    status=$?
    if bring "$folder" "$output" "$name"; then
        rm -rf "$folder"
    else
        echo "error: the run could not be brought to $output; it is on $SLURMD_NODENAME in $folder" >&2
        return 1
    fi
    requeue_if_stopped $status "$@"
    return $status
}

# bring FROM TO NAME: the folder NAME, whole or not at all.
bring() {
    [[ -d $1/$3 ]] || return 0
    rm -rf "$2/.$3.new" "$2/.$3.old" && cp -a "$1/$3" "$2/.$3.new" || return 1
    [[ ! -d $2/$3 ]] || mv "$2/$3" "$2/.$3.old" || return 1
    mv "$2/.$3.new" "$2/$3" && rm -rf "$2/.$3.old"
}

# run_step PROGRAM ARGUMENT...: what srun is not told it takes from the cluster's defaults.
run_step() {
    local options=(
        --kill-on-bad-exit=1 # one process that fails ends the others
        --wait=0 # those that are done do not: the first writes reports while the others have ended
        --gpu-bind=none # every process sees all of its node's graphics cards, and takes the one of its local rank
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" # since SLURM 22.05 not inherited from the job
        --export=ALL
    )
    unset RANK LOCAL_RANK WORLD_SIZE # of a launcher in whose process sbatch was called
    export PYTHONUNBUFFERED=1 # what is printed is in the log at once
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS processes on $SLURM_JOB_NODELIST"
    srun "${options[@]}" "$PYTHON" "$@"
}

# requeue_if_stopped STATUS PROGRAM ARGUMENT...: 75 says that a signal stopped the run, and that the same command goes on.
# A job that makes way for another one may be ended too early for a 75. Where the controller itself ends or requeues this
# job, it is no longer RUNNING. One that is stopped again and again before it has gained anything stays stopped.
requeue_if_stopped() {
    if [[ $1 -eq 0 || $(squeue --noheader --jobs="$job" --format=%T) != RUNNING ]]; then
        return
    fi
    if [[ $1 -eq 75 ]] || scontrol show job "$job" | grep -q ' PreemptTime=[0-9]'; then
        "$PYTHON" "$here/may_go_on.py" "$job" "${@:2}"
        [[ $? -ne 2 ]] || return
        echo "job $job was stopped; it goes back into the queue and will go on from its newest checkpoint"
        scontrol requeue "$job" || echo "job $job may not be requeued: submit the same command again, it goes on" >&2
    fi
}
