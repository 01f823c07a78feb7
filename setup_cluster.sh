#!/usr/bin/env bash
# Make the environment of tribunal, on a login node or a laptop; see --help. Safe to run twice.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./setup_cluster.sh [--dev] [--no-install] [--print-venv] [--help]

Finds a Python >= 3.10 (3.11 preferred), makes a virtual environment with the pinned packages and this
project in it, writes the site file .tribunal-site.env, and says what is missing on this machine and how to
get it. A second run takes about a second; a changed pin is installed; an interrupted run is taken up again.

  --dev         also install what the tests and `make check` need (requirements-dev.txt)
  --no-install  look only: find Python, write the site file, print the checks; no environment, no packages
  --print-venv  print the environment's folder and stop

Settings, taken from the shell's environment, else from the site file:
  TRIBUNAL_PYTHON       this interpreter and no other
  TRIBUNAL_VENV         folder of the environment (default: .venv beside this script)
  TRIBUNAL_MODULES      modules to load first, e.g. "python/3.11 cuda/12.8"
  TORCH_INDEX_URL       package index of the PyTorch build for this site's CUDA (pytorch.org, "Get started")
  TRIBUNAL_SCRATCH      large fast disk for caches and results (default: $SCRATCH where that is set)
  TRIBUNAL_ROOT         folder of checkpoints/ and results/ (default: tribunal/ on scratch, else the current folder)
  HF_HOME PIP_CACHE_DIR TORCH_HOME TRITON_CACHE_DIR
                        caches (default: on scratch, else each tool's own)
  TRIBUNAL_SLURM_ACCOUNT TRIBUNAL_SLURM_PARTITION TRIBUNAL_SLURM_QOS
                        recorded for the jobs that are submitted later

The site file holds KEY=value lines that the shell can source. A line that is there, also behind a '#', is
yours: it is never changed; delete it to get the default again.
HELP
}

say() { printf '%s\n' "$*"; }
note() { printf '  %-8s %s\n' "$1" "$2"; }
die() { # the first argument is the error, the others say what to do
    printf 'error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 2
}

# --- the site file -----------------------------------------------------------------------------------------

site_has() { [ -f "$site" ] && grep -Eq "^[#[:space:]]*$1=" "$site"; }

quoted() { # one word for a shell and for Python's shlex
    if [[ $1 =~ ^[A-Za-z0-9_./:@%+,-]+$ ]]; then
        printf '%s' "$1"
    else
        printf "'%s'" "${1//\'/\'\\\'\'}"
    fi
}

record() { # KEY VALUE: add a line unless the file has one
    local key=$1 value=$2 kept
    [ -n "$value" ] || return 0
    [[ $value != *$'\n'* ]] || die "$key holds a line break, which the site file cannot hold."
    if ! site_has "$key"; then
        printf '%s=%s\n' "$key" "$(quoted "$value")" >>"$site"
        return 0
    fi
    kept=$(unset "$key" && load_site "$site" && printf '%s' "${!key-}")
    [ "$kept" = "$value" ] ||
        note note "$key=$value holds for this run only; $site keeps '$kept': edit that line to change it for good"
}

write_site() {
    if [ ! -e "$site" ]; then
        {
            say "# Settings of this machine, made by setup_cluster.sh and read by every script of tribunal."
            say "# KEY=value; quote values as in a shell. The environment wins over this file. Lines are never overwritten."
        } >"$site"
    fi
    record TRIBUNAL_ROOT "${TRIBUNAL_ROOT-}"
    local key
    for key in HF_HOME PIP_CACHE_DIR TORCH_HOME TRITON_CACHE_DIR TORCH_INDEX_URL TRIBUNAL_PYTHON TRIBUNAL_MODULES \
        TRIBUNAL_SLURM_ACCOUNT TRIBUNAL_SLURM_PARTITION TRIBUNAL_SLURM_QOS; do
        record "$key" "${!key-}"
    done
    [ "$venv" = "$project/.venv" ] || record TRIBUNAL_VENV "$venv"
}

use_scratch() {
    local scratch=${TRIBUNAL_SCRATCH:-${SCRATCH:-}} base
    [ -n "$scratch" ] || return 0
    base=$scratch/tribunal
    if ! mkdir -p "$base" 2>/dev/null || [ ! -w "$base" ]; then
        [ -z "${TRIBUNAL_SCRATCH:-}" ] || die "TRIBUNAL_SCRATCH=$scratch: cannot write there." "Name a folder of yours, or unset it."
        note note "SCRATCH=$scratch is not writable here: caches and results stay where they are by default"
        return 0
    fi
    # A key that the site file holds behind a '#' was switched off by hand.
    site_has TRIBUNAL_ROOT || export TRIBUNAL_ROOT="${TRIBUNAL_ROOT:-$base}"
    site_has HF_HOME || export HF_HOME="${HF_HOME:-$base/cache/huggingface}"
    site_has PIP_CACHE_DIR || export PIP_CACHE_DIR="${PIP_CACHE_DIR:-$base/cache/pip}"
    site_has TORCH_HOME || export TORCH_HOME="${TORCH_HOME:-$base/cache/torch}"
    site_has TRITON_CACHE_DIR || export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$base/cache/triton}"
}

# --- a Python ----------------------------------------------------------------------------------------------

python="" python_version="" seen=""

suits() { # CANDIDATE: sets python and python_version when it is new enough and can make an environment
    local path version
    path=$(command -v "$1" 2>/dev/null) || return 1
    # A pyenv or conda shim may exist without a version behind it, so the candidate has to run.
    version=$("$path" -c 'import platform; print(platform.python_version())' 2>/dev/null </dev/null) || return 1
    if ! [[ $version =~ ^3\.([0-9]+) ]] || [ "${BASH_REMATCH[1]}" -lt 10 ]; then
        seen="$seen${seen:+, }$1 is $version"
        return 1
    fi
    if ! "$path" -c 'import ensurepip, venv' 2>/dev/null </dev/null; then
        seen="$seen${seen:+, }$1 is $version but lacks venv (Debian, Ubuntu: apt install python${version%.*}-venv)"
        return 1
    fi
    python=$path python_version=$version
}

on_path() {
    local name
    # 3.11 first: the version on which the pins were resolved and are tested.
    for name in python3.11 python3.12 python3.13 python3.10 python3 python; do
        if suits "$name"; then return 0; fi
    done
    return 1
}

site_module() { # `module` scripts are not written for set -eu
    local status=0
    set +eu
    module "$@" </dev/null || status=$?
    set -eu
    return "$status"
}

have_modules() {
    local start
    if ! command -v module >/dev/null 2>&1; then
        for start in "${LMOD_PKG:-/nonexistent}/init/bash" "${MODULESHOME:-/nonexistent}/init/bash" /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
            [ -r "$start" ] || continue
            set +eu
            # shellcheck disable=SC1090
            . "$start" >/dev/null 2>&1
            set -eu
            break
        done
    fi
    command -v module >/dev/null 2>&1
}

python_modules() { # names of modules that may hold a new enough Python, the preferred one first
    local all
    all=$(site_module -t avail 2>&1 | sed -e 's/([^)]*)//g' -e 's/[[:space:]]*$//') || true
    grep -Ei '(^|/)(c?python3?|cray-python)/3\.11' <<<"$all" || true
    grep -Ei '(^|/)(c?python3?|cray-python)/3\.(10|1[2-9])' <<<"$all" || true
    grep -Ei '(^|/)(miniforge|mambaforge|miniconda|anaconda)[0-9]*/' <<<"$all" | tail -n 2 || true
}

from_modules() {
    have_modules || return 1
    local name tried=0
    while IFS= read -r name; do
        if [ -z "$name" ] || [ "$tried" -ge 6 ]; then continue; fi
        tried=$((tried + 1))
        if (site_module load "$name" && on_path) >/dev/null 2>&1; then
            site_module load "$name" >/dev/null 2>&1
            on_path
            TRIBUNAL_MODULES="${TRIBUNAL_MODULES:+$TRIBUNAL_MODULES }$name"
            return 0
        fi
    done < <(python_modules)
    return 1
}

from_managers() {
    local tool
    for tool in mamba conda; do
        command -v "$tool" >/dev/null 2>&1 || continue
        if suits "$("$tool" info --base 2>/dev/null </dev/null || true)/bin/python"; then return 0; fi
    done
    if command -v uv >/dev/null 2>&1; then
        if suits "$(uv python find '>=3.10' 2>/dev/null </dev/null || true)"; then return 0; fi
        if $install; then
            say "Fetching Python 3.11 with uv"
            if uv python install 3.11 </dev/null && suits "$(uv python find 3.11 </dev/null)"; then return 0; fi
        fi
    fi
    for tool in mamba conda; do
        if ! $install || ! command -v "$tool" >/dev/null 2>&1; then continue; fi
        say "Making a Python 3.11 with $tool in $venv-python"
        if "$tool" create -y -q -p "$venv-python" python=3.11 pip </dev/null && suits "$venv-python/bin/python"; then return 0; fi
    done
    return 1
}

find_python() {
    if [ -n "${TRIBUNAL_PYTHON:-}" ]; then
        suits "$TRIBUNAL_PYTHON" || die "TRIBUNAL_PYTHON=$TRIBUNAL_PYTHON cannot be used: ${seen:-it does not run}." \
            "Python >= 3.10 with its venv module is needed; name such an interpreter, or unset TRIBUNAL_PYTHON."
        return 0
    fi
    if on_path || from_modules || from_managers; then return 0; fi
    local modules="" cure="on a cluster: find one with 'module avail python' or 'module spider python'"
    if have_modules; then
        modules=$(python_modules | head -n 6 | tr '\n' ' ')
        [ -z "$modules" ] || cure="module load ${modules%% *}    (this site has: ${modules% })"
    fi
    die "no Python >= 3.10 found (${seen:-no python3 on the PATH})." "Do one of these, then run this script again:" \
        "  $cure" \
        "  TRIBUNAL_PYTHON=/path/to/python3.11 ./setup_cluster.sh" \
        "  install uv or conda (no administrator needed), or as administrator: apt install python3 python3-venv"
}

# --- the environment ---------------------------------------------------------------------------------------

ours() { [ -f "$venv/.tribunal-location" ]; }

venv_version() { "$venv/bin/python" -c 'import platform; print(platform.python_version())' 2>/dev/null </dev/null; }

prepare_venv() { # leaves a working environment in $venv, without looking for a Python when there is one
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && ! ours && [ -n "$(ls -A "$venv")" ]; then
        die "$venv is not empty and not a Python environment." "Set TRIBUNAL_VENV to another folder, or remove that one."
    fi
    local why=""
    if python_version=$(venv_version); then
        [[ $python_version =~ ^3\.([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge 10 ] || why="it has Python $python_version"
        if ours && [ "$(cat "$venv/.tribunal-location")" != "$venv" ]; then why="it was moved here"; fi
        if [ -n "${TRIBUNAL_PYTHON:-}" ]; then
            find_python
            [ "$python_version" = "$(venv_version)" ] || why="it has Python $(venv_version), not $python_version"
        fi
        if [ -z "$why" ] && { [ -f "$venv/.tribunal-packages" ] || "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then return 0; fi
        why=${why:-its making was interrupted}
    elif [ -f "$venv/pyvenv.cfg" ]; then
        why="its Python does not run"
    fi
    if [ -n "$why" ]; then
        ours || die "the environment $venv cannot be used: $why." "It was not made by this script: remove it, or set TRIBUNAL_VENV to another folder."
        say "Making $venv anew: $why"
        rm -rf "$venv"
    fi
    [ -n "$python" ] || find_python
    say "Python $python_version ($python)"
    mkdir -p "$venv" 2>/dev/null || die "cannot make $venv." "Set TRIBUNAL_VENV to a folder that you can write."
    printf '%s\n' "$venv" >"$venv/.tribunal-location"
    : >"$log"
    step "environment" "$python" -m venv "$venv"
}

progress() { # log every line; show packages as they come
    local line shown=""
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case $line in
            Collecting* | *Downloading* | Installing* | *Building*)
                if [ -t 1 ]; then
                    line=${line#"${line%%[![:space:]]*}"}
                    printf '\r\033[K%s: %s' "$1" "${line:0:90}"
                    shown=yes
                elif [[ $line == Collecting* ]]; then
                    printf '.'
                fi
                ;;
        esac
    done
    [ -z "$shown" ] || printf '\r\033[K%s' "$1"
}

step() { # NAME COMMAND...
    local name=$1 start=$SECONDS ends
    shift
    printf '%s ' "$name"
    if "$@" 2>&1 </dev/null | progress "$name"; then
        printf ' %d s\n' "$((SECONDS - start))"
        return 0
    fi
    printf ' failed\n'
    {
        say "error: $name could not be installed. The end of $log:"
        grep -v '^Requirement already satisfied' "$log" | tail -n 12 | cut -c -300 | sed 's/^/  | /'
        ends=$(tail -n 40 "$log")
        if grep -qiE 'no space left|disk quota' <<<"$ends"; then
            say "The disk or quota is full: set TRIBUNAL_VENV, PIP_CACHE_DIR and TMPDIR to a larger disk and run again."
        elif grep -qiE 'connection|timed out|temporary failure|name resolution|SSL|proxy' <<<"$ends"; then
            say "The package index could not be reached: run this on a node with network (a login node), or set the site's proxy; then run again."
        elif grep -qi 'no matching distribution' <<<"$ends"; then
            say "No such version for this Python or platform: try another Python (TRIBUNAL_PYTHON) or check TORCH_INDEX_URL; then run again."
        else
            say "Mend what it names and run this script again: it goes on from here."
        fi
    } >&2
    exit 1
}

digest() { # of files and words, in an order that is fixed
    "$venv/bin/python" -c '
import hashlib, pathlib, sys
print(hashlib.sha256(b"\0".join(pathlib.Path(a[1:]).read_bytes() if a[0] == "@" else a.encode() for a in sys.argv[1:])).hexdigest())' "$@"
}

pip_install() { "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "$@"; }

packages() {
    local stamp=$venv/.tribunal-packages dev_stamp=$venv/.tribunal-dev-packages index=${TORCH_INDEX_URL-} key dev_key torch info
    key=$(digest @"$project/requirements.txt" @"$project/pyproject.toml" ":$index" ":$python_version" ":$project")
    dev_key=$(digest ":$key" @"$project/requirements-dev.txt")
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        fresh=true
        rm -f "$stamp"
        : >"$log"
        # pip writes INSTALLER last: without it a package was cut off half-way, yet pip would take it for installed.
        for info in "$venv"/lib/python*/site-packages/*.dist-info; do
            if ours && [ -d "$info" ] && [ ! -f "$info/INSTALLER" ]; then rm -rf "$info"; fi
        done
        torch=$(grep -E '^torch==' "$project/requirements.txt")
        # pip takes any build of the pinned version for installed: another index needs a clean place.
        if [ -f "$venv/.tribunal-torch-index" ] && [ "$(cat "$venv/.tribunal-torch-index")" != "$index" ]; then
            step "removing the other build of torch" "$venv/bin/python" -m pip uninstall -y torch
        fi
        printf '%s\n' "$index" >"$venv/.tribunal-torch-index"
        step "$torch${index:+ from $index}" pip_install "$torch" ${index:+--index-url "$index"}
        step "requirements.txt" pip_install -r "$project/requirements.txt"
        step "tribunal (editable)" pip_install --no-deps --no-build-isolation -e "$project"
        step "pip check" "$venv/bin/python" -m pip check
        printf '%s\n' "$key" >"$stamp.new" && mv "$stamp.new" "$stamp"
    fi
    if $dev && [ "$(cat "$dev_stamp" 2>/dev/null)" != "$dev_key" ]; then
        fresh=true
        rm -f "$dev_stamp"
        step "requirements-dev.txt" pip_install -r "$project/requirements-dev.txt"
        printf '%s\n' "$dev_key" >"$dev_stamp.new" && mv "$dev_stamp.new" "$dev_stamp"
    fi
    if ! $fresh; then say "Environment up to date: $venv (Python $python_version)"; fi
}

# --- what this machine has ---------------------------------------------------------------------------------

check_root() {
    local root=${TRIBUNAL_ROOT:-$project} probe free_gb
    mkdir -p "$root" 2>/dev/null || true
    probe=$root/.tribunal-write-test.$$
    if ! (: >"$probe") 2>/dev/null; then
        die "cannot write to $root, where checkpoints/ and results/ go." "Set TRIBUNAL_ROOT to a folder that you can write (in $site or in the environment)."
    fi
    rm -f "$probe"
    free_gb=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1048576)}')
    if [ "$free_gb" -lt 10 ]; then
        note missing "only $free_gb GB free at $root: the demo needs 1 GB, a real model's activations tens; set TRIBUNAL_ROOT to a larger disk"
    else
        note ok "$free_gb GB free at $root"
    fi
}

check_slurm() {
    if command -v sbatch >/dev/null 2>&1; then
        note ok "SLURM: $(command -v sbatch)"
    else
        note note "no sbatch here: jobs run in the foreground, on this machine"
    fi
}

check_gpu() {
    local build="" gpus
    if [ -d "$venv" ] && $install; then # read the build's CUDA version without the seconds of importing torch
        build=$("$venv/bin/python" -c '
import importlib.util, pathlib, re
version = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text()
found = re.search(r"^cuda\b[^=\n]*= *[\x27\"]([^\x27\"]+)", version, re.M)
print("CUDA " + found[1] if found else "no CUDA")')
    fi
    if ! command -v nvidia-smi >/dev/null 2>&1 || ! gpus=$(nvidia-smi -L 2>/dev/null) || [ -z "$gpus" ]; then
        note note "no GPU visible here${build:+ (torch: $build)}: the demo needs none; on a cluster the compute nodes have their own"
        if [ "$build" = "no CUDA" ] && command -v sbatch >/dev/null 2>&1; then
            note note "torch is a CPU build: where compute nodes have GPUs, run again with TORCH_INDEX_URL=<index of the CUDA build>"
        fi
        return 0
    fi
    note ok "GPU: $(grep -c . <<<"$gpus") visible, first $(head -n 1 <<<"$gpus" | cut -d '(' -f 1)"
    if [ "$build" = "no CUDA" ]; then
        note missing "torch is a CPU build: run again with TORCH_INDEX_URL=<index of the build for this driver's CUDA> (see 'Get started' on pytorch.org)"
    elif $fresh && ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        note missing "torch ($build) cannot use the GPU; the driver may be older: run again with TORCH_INDEX_URL=<index of a build that 'nvidia-smi' supports>"
    fi
}

# --- main --------------------------------------------------------------------------------------------------

dev=false install=true print_venv=false fresh=false
for argument in "$@"; do
    case $argument in
        --dev) dev=true ;;
        --no-install) install=false ;;
        --print-venv) print_venv=true ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && die "unknown option '$argument'." ;;
    esac
done

project=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=$project/.tribunal-site.env
# shellcheck source=sbatch/site.sh
. "$project/sbatch/site.sh"
load_site "$site"
venv=${TRIBUNAL_VENV:-$project/.venv}
case $venv in /*) ;; *) venv=$project/$venv ;; esac
log=$venv/setup.log
if $print_venv; then
    say "$venv"
    exit 0
fi

# A user's pip settings or a module's PYTHONPATH would install elsewhere or shadow the pins.
export PIP_USER=0 PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME
trap 'printf "\ninterrupted; run ./setup_cluster.sh again to go on\n" >&2; exit 130' INT TERM

# Two set-ups at once (two shells, two nodes) take turns. Where the file system has no locks, they do not.
if $install && command -v flock >/dev/null 2>&1; then
    exec 9<"$project"
    if ! flock -n 9 2>/dev/null; then
        say "Another set-up is running here; waiting for it (at most 30 min)"
        flock -w 1800 9 2>/dev/null || note note "going on without the lock"
    fi
fi

if [ -n "${TRIBUNAL_MODULES:-}" ] && have_modules; then
    for name in $TRIBUNAL_MODULES; do
        site_module load "$name" || die "module load $name failed." "See 'module avail'; TRIBUNAL_MODULES is set in the environment or in $site."
    done
fi
use_scratch
if $install; then
    prepare_venv
    packages
else
    find_python
    say "Python $python_version ($python)"
fi
write_site
say "Checks (settings: $site)"
check_root
check_slurm
check_gpu
