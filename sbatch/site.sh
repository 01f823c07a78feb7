# Sourced by setup_cluster.sh, sbatch/task.sh and sbatch/pipeline.sh: how a shell reads the site file, as tribunal/cluster/site.py does.
# shellcheck shell=bash

load_site() { # FILE: export its KEY=value lines, quoted as in a shell; what the environment says wins
    [ -f "$1" ] || return 0
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
        [ -n "${!BASH_REMATCH[2]+set}" ] || eval "export ${BASH_REMATCH[2]}=${BASH_REMATCH[3]}"
    done <"$1"
}

use_site() { # PROJECT: the site file's values, its modules, and the environment's Python first on the PATH
    local name venv
    load_site "$1/.tribunal-site.env"
    for name in ${TRIBUNAL_MODULES:-}; do module load "$name"; done
    venv=${TRIBUNAL_VENV:-$1/.venv}
    [ ! -x "$venv/bin/python" ] || PATH=$venv/bin:$PATH
}
