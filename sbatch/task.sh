#!/bin/bash
# What every script here runs inside its job: the site's modules and environment, then Python as a task of srun.
#
#   task.sh MODULE [ARGUMENT...]
#
# The first start copies the code and the resolved experiment; that copy is what this start and all later ones run.
# SLURM sends its early signal to the tasks of a step, so Python has to be one. Until its handlers stand the signal is
# ignored, not deadly: the job's own deadline then stands in for it.
set -euo pipefail
export TRIBUNAL_HOME=${TRIBUNAL_HOME:-$SLURM_SUBMIT_DIR}
# shellcheck source=sbatch/site.sh
. "$TRIBUNAL_HOME/sbatch/site.sh"
use_site "$TRIBUNAL_HOME"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
start=$(PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$TRIBUNAL_HOME python -m tribunal.cluster.by_hand "$@")
mapfile -t start <<<"$start"
export PYTHONPATH=${start[0]}${PYTHONPATH:+:$PYTHONPATH}
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'trap "" USR1; exec "$@"' tribunal python "${start[@]:1}"
