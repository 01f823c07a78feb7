#!/bin/bash
# A pipeline as dependent jobs, by hand: each starts on its inputs' receipts, however often those were interrupted.
# The code and the experiment are copied now: edits made while a job waits change nothing.
#
#   sbatch/pipeline.sh [calibrate|cross_examine|oracle|trial] experiments/X.yaml [section.key=value ...]
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
pipeline=calibrate
[[ $1 == *.y*ml ]] || { pipeline=$1 && shift; }
[ $# -ge 1 ] || { echo "error: give the experiment file after '$pipeline'" >&2; exit 2; }
made=$(PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD python -m tribunal.cluster.by_hand --now "$pipeline" "$@")
mapfile -t made <<<"$made"
export TRIBUNAL_HOME=$PWD
after='' names=''
for job in "${made[@]:1}"; do
    given=("${made[0]}")
    [ "$job" != report ] || given+=("report.after=[$names]")
    id=$(sbatch --parsable ${after:+"$after"} "sbatch/$job.sbatch" "${given[@]}")
    echo "$job: ${id%%;*}"
    # afterany, not afterok: an interrupted parent ends with a code other than 0 and goes on, and its child looks for its receipt
    after=--dependency=afterany:${id%%;*} names=${names:+$names,}$job
done
