#!/bin/bash
# What every script here runs inside its job: the site's modules and environment, then Python as a task of srun.
#
#   task.sh MODULE [ARGUMENT...]
#
# SLURM sends its early signal to the tasks of a step, so Python has to be one. Until its handlers stand the signal is
# ignored, not deadly: the job's own deadline then stands in for it.
set -euo pipefail
home=${TRIBUNAL_HOME:-$SLURM_SUBMIT_DIR}
if [ -f "$home/.tribunal-site.env" ]; then
    while IFS= read -r line || [ -n "$line" ]; do # the environment wins over the file
        [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)= ]] && [ -z "${!BASH_REMATCH[1]+set}" ] && eval "export $line"
    done <"$home/.tribunal-site.env"
fi
for module in ${TRIBUNAL_MODULES:-}; do module load "$module"; done
venv=${TRIBUNAL_VENV:-$home/.venv}
[ ! -x "$venv/bin/python" ] || PATH=$venv/bin:$PATH
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$home"
exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash -c 'trap "" USR1; exec "$@"' tribunal python -m "$@"
