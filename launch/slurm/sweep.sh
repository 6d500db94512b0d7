#!/usr/bin/env bash
# Train once per line of `runs`, each as a job of its own; the array's numbers are the lines, from 0.
#
#   sbatch launch/slurm/sweep.sh recipes/alpaca.yaml [key=value ...]
#
#SBATCH --job-name=sweep
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

runs=(
    'name=sweep-0.0 adapter.dropout.rate=0.0'
    'name=sweep-0.3 adapter.dropout.rate=0.3'
    'name=sweep-0.5 adapter.dropout.rate=0.5'
)

source launch/slurm/run.sh || exit 2
read -ra overrides <<<"${runs[$SLURM_ARRAY_TASK_ID]}"
launch launch/sft.py "$@" "${overrides[@]}"
