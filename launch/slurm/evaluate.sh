#!/usr/bin/env bash
# Evaluate the adapter that a recipe has trained. One that is stopped goes back into the queue; its answers are kept.
#
#   sbatch launch/slurm/evaluate.sh recipes/alpaca.yaml [key=value ...]
#
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source launch/slurm/run.sh || exit 2
launch launch/evaluate.py "$@"
