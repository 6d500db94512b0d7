#!/usr/bin/env bash
# Train on several nodes, then evaluate, in one job. The folder `output` of the recipe must be on a disk that all nodes
# share: each reads the checkpoint from which a requeued job goes on.
#
#   sbatch [--nodes=4] launch/slurm/several_nodes.sh recipes/alpaca.yaml [key=value ...]
#
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# A cluster whose node names do not resolve needs this; else pipeline/process/rank.py takes the first node's name:
# export MASTER_ADDR=$(getent ahostsv4 "$(hostname)" | awk '{print $1; exit}')
# Which network interface the processes use, where they do not find it:
# export NCCL_SOCKET_IFNAME=ib0

source launch/slurm/run.sh || exit 2
launch launch/sft.py "$@"
