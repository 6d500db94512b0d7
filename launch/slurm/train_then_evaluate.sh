#!/usr/bin/env bash
# Two jobs: training, and an evaluation that starts when the training has finished well. Called by bash, not by sbatch.
#
#   bash launch/slurm/train_then_evaluate.sh recipes/alpaca.yaml [key=value ...]
#
# afterok waits for the end of the training, however often that is stopped and requeued: its number stays. If the
# training fails, the evaluation is cancelled; without --kill-on-invalid-dep it would wait for ever.
set -euo pipefail

training=$(sbatch --parsable launch/slurm/several_nodes.sh --no-eval "$@")
training=${training%%;*} # on several clusters it is followed by the cluster's name
evaluation=$(sbatch --parsable --dependency="afterok:$training" --kill-on-invalid-dep=yes launch/slurm/evaluate.sh "$@")
echo "training: job $training; evaluation: job ${evaluation%%;*}"
