#!/usr/bin/env bash
# Train once per seed, each as a job of its own: the numbers of the array are the seeds.
#
#   sbatch --array=0-4 launch/slurm/seeds.sh NAME recipes/alpaca.yaml [key=value ...]     runs NAME-seed0 to NAME-seed4
#
#SBATCH --job-name=seeds
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

source launch/slurm/run.sh || exit 2
name=$1-seed$SLURM_ARRAY_TASK_ID
shift
launch launch/sft.py "$@" "name=$name" "seed=$SLURM_ARRAY_TASK_ID"
