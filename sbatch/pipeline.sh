#!/bin/bash
# The calibration as four dependent jobs, by hand: each starts on its input's receipt, however often that was interrupted.
#
#   sbatch/pipeline.sh experiments/X.yaml [section.key=value ...]
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
after=()
for job in generate_traces label_traces extract_activations train_probes; do
    id=$(sbatch --parsable "${after[@]}" "sbatch/$job.sbatch" "$@")
    echo "$job: ${id%%;*}"
    # afterany, not afterok: an interrupted parent ends with a code other than 0 and goes on, and its child looks for its receipt
    after=(--dependency="afterany:${id%%;*}")
done
