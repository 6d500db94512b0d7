#!/usr/bin/env bash
# Train on one node, then evaluate, in one job. A run that is stopped goes back into the queue and goes on.
#
#   sbatch launch/slurm/one_node.sh recipes/alpaca.yaml [key=value ...]
#
# Call it from the repository's root, in your python environment. Edit these lines to your cluster, or give options to
# sbatch, where they win. Without graphics cards: delete --gpus-per-node, and let --ntasks-per-node be 1 per socket.
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

source launch/slurm/run.sh || exit 2
launch launch/sft.py "$@"
