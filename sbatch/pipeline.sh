#!/bin/bash
# A pipeline as dependent jobs, by hand: each starts on its inputs' receipts, however often those were interrupted.
#
#   sbatch/pipeline.sh [calibrate|cross_examine|oracle|trial] experiments/X.yaml [section.key=value ...]
#
# SBATCH_ACCOUNT, SBATCH_PARTITION and the like choose where they run; else the site file's TRIBUNAL_SLURM_* values.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
if [ -f .tribunal-site.env ]; then
    while IFS= read -r line || [ -n "$line" ]; do
        [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)= ]] && [ -z "${!BASH_REMATCH[1]+set}" ] && eval "export $line"
    done <.tribunal-site.env
fi
for name in ACCOUNT PARTITION QOS; do
    site=TRIBUNAL_SLURM_$name given=SBATCH_$name
    [ -n "${!given-}" ] || [ -z "${!site-}" ] || export "$given=${!site}"
done
pipeline=calibrate
[[ $1 == *.y*ml ]] || { pipeline=$1 && shift; }
case $pipeline in
    calibrate) jobs="generate_traces label_traces extract_activations train_probes" ;;
    cross_examine) jobs="monitor_traces steer select_answers attribute_direction transfer_probes report" ;;
    oracle) jobs="label_sentences train_oracle evaluate_oracle report" ;;
    trial)
        jobs="generate_traces label_traces extract_activations train_probes monitor_traces steer select_answers"
        jobs="$jobs attribute_direction transfer_probes label_sentences train_oracle evaluate_oracle report"
        ;;
    *) echo "error: no pipeline '$pipeline'; expected calibrate, cross_examine, oracle or trial, then the experiment file" >&2; exit 2 ;;
esac
[ $# -ge 1 ] || { echo "error: give the experiment file after '$pipeline'" >&2; exit 2; }
after='' names=''
for job in $jobs; do
    given=("$@")
    [ "$job" != report ] || given+=("report.after=[$names]")
    id=$(sbatch --parsable ${after:+"$after"} "sbatch/$job.sbatch" "${given[@]}")
    echo "$job: ${id%%;*}"
    # afterany, not afterok: an interrupted parent ends with a code other than 0 and goes on, and its child looks for its receipt
    after=--dependency=afterany:${id%%;*} names=${names:+$names,}$job
done
