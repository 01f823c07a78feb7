#!/bin/bash
# The calibration as four dependent jobs, by hand: each starts on its input's receipt, however often that was interrupted.
# The code and the experiment are copied now: edits made while a job waits change nothing.
#
#   sbatch/pipeline.sh experiments/X.yaml [section.key=value ...]
#
# SBATCH_ACCOUNT, SBATCH_PARTITION and the like choose where they run; else the site file's TRIBUNAL_SLURM_* values.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
. sbatch/site.sh
use_site "$PWD"
for name in ACCOUNT PARTITION QOS; do
    site=TRIBUNAL_SLURM_$name given=SBATCH_$name
    [ -n "${!given-}" ] || [ -z "${!site-}" ] || export "$given=${!site}"
done
experiment=$(PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD python -m tribunal.cluster.by_hand --now "$@")
export TRIBUNAL_HOME=$PWD
after=()
for job in generate_traces label_traces extract_activations train_probes; do
    id=$(sbatch --parsable "${after[@]}" "sbatch/$job.sbatch" "$experiment")
    echo "$job: ${id%%;*}"
    # afterany, not afterok: an interrupted parent ends with a code other than 0 and goes on, and its child looks for its receipt
    after=(--dependency="afterany:${id%%;*}")
done
