"""setup_cluster.sh: the right Python or a message that helps, one site file, and no half-made environment taken for done.

The script runs for real, in a copy of the project whose path has a space and a quote. Nothing is fetched: packages are
small wheels made here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tribunal.cluster.site import _parse

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["python3.10", "python3.11", "python3.12", "python3.13", "python3", "python"]
MANAGERS = ["conda", "mamba", "uv"]
NO_MODULES = "() { :; }"

BACKEND = """
import shutil
def build_editable(folder, *_):
    return shutil.copy("wheels/tribunal-0.0.0-py3-none-any.whl", folder).rpartition("/")[2]
"""


def executable(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


class Machine:
    """A machine with old Pythons only, no scratch, no modules and no package index; a test adds what it needs."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "someone's clone"
        self.project.mkdir()
        for name in ("setup_cluster.sh", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project)
        (self.project / "sbatch").mkdir()
        shutil.copy(ROOT / "sbatch" / "site.sh", self.project / "sbatch")
        self.site = self.project / ".tribunal-site.env"
        for name in PYTHONS:
            executable(folder / "bin" / name, "#!/bin/sh\necho 3.8.18\n")
        for name in [*MANAGERS, "nvidia-smi"]:
            executable(folder / "bin" / name, "#!/bin/sh\nexit 1\n")
        self.env = {
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(folder),
            "BASH_FUNC_module%%": NO_MODULES,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
        }

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.project / "setup_cluster.sh"), *arguments]
        return subprocess.run(command, cwd="/", env={**self.env, **env}, capture_output=True, text=True, timeout=120, check=False)

    def settings(self) -> dict[str, str]:
        """The site file as Python reads it: one KEY=value a line, quoted as in a shell."""
        words = [shlex.split(line, comments=True) for line in self.site.read_text().splitlines()]
        return dict(word.split("=", 1) for line in words for word in line)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", ["setup_cluster.sh", ".ci/run", *(f"sbatch/{path.name}" for path in (ROOT / "sbatch").glob("*.sh"))])
def test_the_scripts_are_clean_shell(script: str):
    checks = [["bash", "-n"], ["shellcheck", "-x"]] if shutil.which("shellcheck") else [["bash", "-n"]]
    for check in checks:
        run = subprocess.run([*check, script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_help_names_every_setting_that_the_script_reads(machine: Machine):
    run = machine.run("--help")
    assert run.returncode == 0
    for name in ("TRIBUNAL_PYTHON", "TRIBUNAL_VENV", "TORCH_INDEX_URL", "TRIBUNAL_ROOT", "SCRATCH", "--dev", "--no-install"):
        assert name in run.stdout
    assert machine.run("--instal").returncode == 2


def test_the_python_that_is_given_is_taken_and_nothing_is_installed_on_no_install(machine: Machine):
    run = machine.run("--no-install", TRIBUNAL_PYTHON=sys.executable)
    assert run.returncode == 0, run.stderr
    assert f"({sys.executable})" in run.stdout
    assert machine.site.exists()
    assert not (machine.project / ".venv").exists()


def test_a_python_on_the_path_is_found_where_older_ones_stand_before_it(machine: Machine, tmp_path: Path):
    (tmp_path / "bin" / "python3.12").unlink()
    (tmp_path / "bin" / "python3.12").symlink_to(sys.executable)
    run = machine.run("--no-install")
    assert run.returncode == 0, run.stderr
    assert "python3.12)" in run.stdout


def test_a_shim_without_a_version_behind_it_is_passed_over(machine: Machine, tmp_path: Path):
    executable(tmp_path / "bin" / "python3.11", "#!/bin/sh\necho 'python3.11: command not found' >&2\nexit 127\n")
    executable(tmp_path / "bin" / "python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    run = machine.run("--no-install")
    assert run.returncode == 0, run.stderr
    assert "bin/python3)" in run.stdout


def test_an_old_python_that_is_given_is_refused_by_name(machine: Machine, tmp_path: Path):
    old = str(tmp_path / "bin" / "python3")
    run = machine.run("--no-install", TRIBUNAL_PYTHON=old)
    assert run.returncode == 2
    assert f"TRIBUNAL_PYTHON={old}" in run.stderr
    assert "is 3.8.18" in run.stderr
    assert "Python >= 3.10" in run.stderr
    assert not machine.site.exists()


def test_without_a_new_enough_python_the_message_says_what_was_seen_and_what_to_do(machine: Machine):
    run = machine.run("--no-install")
    assert run.returncode == 2
    assert "no Python >= 3.10 found" in run.stderr
    assert "python3 is 3.8.18" in run.stderr
    assert "TRIBUNAL_PYTHON=" in run.stderr


def test_a_module_that_has_a_python_is_loaded_and_recorded(machine: Machine, tmp_path: Path):
    executable(tmp_path / "module" / "python3.11", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    listing = "printf 'gcc/13.2\\npython/3.9.6\\npython/3.10.4\\npython/3.11.5(default)\\n' >&2"
    load = f"PATH={shlex.quote(str(tmp_path / 'module'))}:$PATH"
    function = f'() {{ if [ "$1" = load ] && [ "$2" = python/3.11.5 ]; then {load}; else {listing}; fi; }}'
    run = machine.run("--no-install", **{"BASH_FUNC_module%%": function})
    assert run.returncode == 0, run.stderr
    assert "module/python3.11)" in run.stdout
    assert machine.settings()["TRIBUNAL_MODULES"] == "python/3.11.5"


def test_the_message_names_the_module_to_load_where_loading_it_did_not_help(machine: Machine):
    function = '() { if [ "$1" = load ]; then return 1; fi; printf "python/3.12.1\\n" >&2; }'
    run = machine.run("--no-install", **{"BASH_FUNC_module%%": function})
    assert run.returncode == 2
    assert "module load python/3.12.1" in run.stderr


def test_caches_and_results_go_to_scratch_and_the_shell_reads_the_site_file_as_python_does(machine: Machine, tmp_path: Path):
    scratch = tmp_path / "it's scratch"
    scratch.mkdir()
    run = machine.run("--no-install", TRIBUNAL_PYTHON=sys.executable, SCRATCH=str(scratch), TRIBUNAL_SLURM_ACCOUNT="abc 123")
    assert run.returncode == 0, run.stderr
    settings = machine.settings()
    assert settings["TRIBUNAL_ROOT"] == str(scratch / "tribunal")
    assert settings["HF_HOME"] == str(scratch / "tribunal/cache/huggingface")
    assert settings["TRIBUNAL_SLURM_ACCOUNT"] == "abc 123"
    for source in (f"set -a; . {shlex.quote(str(machine.site))}", f". sbatch/site.sh; load_site {shlex.quote(str(machine.site))}"):
        sourced = environment_after(source, machine.project)
        assert {key: sourced.get(key) for key in settings} == settings


def test_the_site_file_is_read_by_the_scripts_as_by_python_and_the_environment_wins(machine: Machine):
    machine.site.write_text("# mine\n#A=off\nB='two words'\n export C=\"it's\"\nD=\nPATH=/nowhere\nE=last")
    settings = {key: value for key, value in _parse(machine.site).items() if key != "PATH"}
    sourced = environment_after(f". sbatch/site.sh; load_site {shlex.quote(str(machine.site))}", machine.project)
    assert settings == {"B": "two words", "C": "it's", "D": "", "E": "last"}
    assert {key: sourced.get(key) for key in ("A", *settings)} == {"A": None, **settings}
    assert sourced["PATH"] == "/usr/bin:/bin"


def environment_after(script: str, folder: Path) -> dict[str, str]:
    """The environment after some lines of bash."""
    shell = subprocess.run(
        ["bash", "-euc", f"{script}; env -0"], cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    return dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if "=" in entry)


def test_without_scratch_everything_stays_where_it_is_by_default(machine: Machine):
    assert machine.run("--no-install", TRIBUNAL_PYTHON=sys.executable).returncode == 0
    assert set(machine.settings()) == {"TRIBUNAL_PYTHON"}


def test_lines_of_the_site_file_are_kept_and_a_setting_for_one_run_is_pointed_out(machine: Machine, tmp_path: Path):
    kept = f"# mine\nHF_HOME='/a cache'\n# PIP_CACHE_DIR=off\nTRIBUNAL_PYTHON={shlex.quote(sys.executable)}\n"
    machine.site.write_text(kept)
    first = machine.run("--no-install", SCRATCH=str(tmp_path), HF_HOME="/elsewhere")
    assert first.returncode == 0, first.stderr
    assert "HF_HOME=/elsewhere holds for this run only" in first.stdout
    text = machine.site.read_text()
    assert text.startswith(kept)
    assert machine.settings()["HF_HOME"] == "/a cache"
    assert "PIP_CACHE_DIR" not in machine.settings()
    assert machine.settings()["TRIBUNAL_ROOT"] == str(tmp_path / "tribunal")
    assert machine.run("--no-install", SCRATCH=str(tmp_path / "another")).returncode == 0
    assert machine.site.read_text() == text


def test_a_root_that_cannot_be_written_is_an_error_that_names_it(machine: Machine, tmp_path: Path):
    (tmp_path / "file").touch()
    run = machine.run("--no-install", TRIBUNAL_PYTHON=sys.executable, TRIBUNAL_ROOT=str(tmp_path / "file" / "root"))
    assert run.returncode == 2
    assert f"cannot write to {tmp_path / 'file' / 'root'}" in run.stderr


def test_a_folder_that_is_no_environment_is_never_overwritten(machine: Machine, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    run = machine.run(TRIBUNAL_PYTHON=sys.executable, TRIBUNAL_VENV=str(tmp_path / "precious"))
    assert run.returncode == 2
    assert "not a Python environment" in run.stderr
    assert [file.name for file in (tmp_path / "precious").iterdir()] == ["thesis.tex"]


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        metadata = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
        metadata["WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        everything = {**files, **{f"{info}/{key}": text for key, text in metadata.items()}}
        everything[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*everything, f"{info}/RECORD"])
        for path, text in everything.items():
            archive.writestr(path, text)


def installed(machine: Machine, name: str, venv: Path) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_is_done_only_when_everything_is_installed_and_a_changed_pin_is_installed_again(machine: Machine):
    project, venv = machine.project, machine.project / ".venv"
    wheels = project / "wheels"
    wheel(wheels, "tribunal", "0.0.0", {})
    wheel(wheels, "torch", "2.13.0", {"torch/__init__.py": "", "torch/version.py": "cuda: str | None = '12.8'\n"})
    wheel(wheels, "other", "1.0", {"other.py": ""})
    wheel(wheels, "tester", "1.0", {"tester.py": ""})
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n")
    (project / "requirements.txt").write_text("torch==2.13.0\nother==2.0\n")
    (project / "requirements-dev.txt").write_text("tester==1.0\n")
    settings = {"TRIBUNAL_PYTHON": sys.executable, "PIP_FIND_LINKS": wheels.as_uri()}

    failed = machine.run(**settings)
    assert failed.returncode == 1
    assert "No matching distribution found for other==2.0" in failed.stderr
    assert "run again" in failed.stderr
    assert not (venv / ".tribunal-packages").exists()

    (project / "requirements.txt").write_text("torch==2.13.0\nother==1.0\n")
    done = machine.run(**settings)
    assert done.returncode == 0, done.stderr
    assert "torch: CUDA 12.8" in done.stdout
    assert installed(machine, "tribunal", venv) == "0.0.0"
    assert not (venv / ".tribunal-dev-packages").exists()

    log = (venv / "setup.log").stat().st_mtime_ns
    again = machine.run(**settings)
    assert "Environment up to date" in again.stdout
    assert (venv / "setup.log").stat().st_mtime_ns == log

    wheel(wheels, "other", "2.0", {"other.py": ""})
    (project / "requirements.txt").write_text("torch==2.13.0\nother==2.0\n")
    assert machine.run("--dev", **settings).returncode == 0
    assert installed(machine, "other", venv) == "2.0"
    assert installed(machine, "tester", venv) == "1.0"

    moved = project.rename(project.with_name("moved clone"))
    machine.project = moved
    run = machine.run(TRIBUNAL_PYTHON=sys.executable, PIP_FIND_LINKS=(moved / "wheels").as_uri())
    assert "it was moved here" in run.stdout, run.stderr
    assert installed(machine, "tribunal", moved / ".venv") == "0.0.0"
