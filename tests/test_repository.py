"""The repository is complete, holds nothing personal, and a job or dataset is one file of one shape."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import scheduling
from tribunal.cluster.job import Job
from tribunal.core import registry
from tribunal.core.config import DatasetConfig, Section

ROOT = Path(__file__).resolve().parents[1]

REQUIRED = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", ".gitignore", ".ci/run"),
    *("requirements.txt", "requirements-dev.txt", "setup_cluster.sh", "checkpoints/.gitkeep", "results/.gitkeep"),
    *("experiments/demo.yaml", "docs/architecture.md", "docs/files.md"),
]
PIN = re.compile(r'(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>\d[\w.]*)(; python_version (?P<when>[<>]=?) "3\.\d+")?')
PERSONAL = re.compile(r"(?<![\w.$}*/-])/(?:home|Users|work|root)/[\w.-]+|(?<![\w.$}*/-])/opt/(?:wheels|pypi)")
IMPORTED_AS = {"yaml": "pyyaml", "sklearn": "scikit-learn"}


def git(*arguments: str) -> str:
    if subprocess.run(["git", "rev-parse", "--git-dir"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def pins(name: str) -> dict[str, list[re.Match[str]]]:
    """Package (normalised) -> its lines in a requirements file."""
    found: dict[str, list[re.Match[str]]] = {}
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        if line and not line.startswith("#"):
            match = PIN.fullmatch(line)
            assert match, f"{name}:{number}: {line!r} is no exact pin (package==version)"
            found.setdefault(re.sub(r"[-_.]+", "-", match["name"]).lower(), []).append(match)
    return found


def test_the_files_that_a_newcomer_looks_for_are_there():
    assert [name for name in REQUIRED if not (ROOT / name).is_file()] == []
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_files_that_are_tested_first_are_there():
    assert [name for name in (*scheduling.LONGEST, *scheduling.WHOLE) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("folder", ["checkpoints", "results"])
def test_only_the_empty_folder_of_checkpoints_and_results_is_in_git(folder: str):
    assert git("check-ignore", f"{folder}/demo/receipt.json") != ""
    assert git("check-ignore", f"{folder}/.gitkeep") == ""
    assert set(git("ls-files", folder).split()) <= {f"{folder}/.gitkeep"}


def test_no_file_holds_a_path_of_somebodys_machine():
    found = []
    for name in filter(None, git("ls-files", "-co", "--exclude-standard", "-z").split("\0")):
        file = ROOT / name
        if not file.is_file() or file.suffix in {".png", ".safetensors"} or file.samefile(__file__):
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if match := PERSONAL.search(line):
                found.append(f"{name}:{number}: {match.group()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_once_for_each_python(name: str):
    for package, lines in pins(name).items():
        assert [line["when"] for line in lines] in ([None], [">=", "<"]), f"{name}: {package}"


def test_everything_that_is_imported_is_pinned():
    known = set(pins("requirements.txt"))
    missing = set()
    for file in [*(ROOT / "tribunal").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"tribunal", "jobs"}:
                package = IMPORTED_AS.get(top, top.replace("_", "-"))
                if package not in known:
                    missing.add(f"{file.relative_to(ROOT)}:{node.lineno}: {package}")
    assert not missing, "\n".join(sorted(missing))


def test_the_environment_has_the_pinned_versions():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for package, lines in pins(name).items():
            line = lines[0] if sys.version_info >= (3, 11) else lines[-1]
            installed = importlib.metadata.version(package).partition("+")[0]
            assert installed == line["version"], f"{package}: {installed} is installed; run ./setup_cluster.sh --dev"


@pytest.mark.parametrize("name", registry.names("jobs"))
def test_a_job_is_one_file_of_one_shape(name: str):
    module = registry.load("jobs", name, "job")
    assert issubclass(module.Config, Section)
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Job) and kind is not Job]
    assert [kind.name for kind in kinds] == [name]
    assert set(kinds[0].needs) <= set(registry.names("jobs"))
    assert module.__doc__ and f"python -m jobs.{name} " in module.__doc__, "the module says how it is run"
    assert f'main("{name}")' in (ROOT / "jobs" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", registry.names("jobs"))
def test_the_script_to_submit_a_job_by_hand_asks_for_what_the_job_says_it_needs(name: str):
    module = registry.load("jobs", name, "job")
    needs = next(kind.resources for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Job) and kind is not Job)
    asked = dict(
        re.findall(r"^#SBATCH --(time|cpus-per-task|mem|gpus-per-task)=(\S+)$", (ROOT / "sbatch" / f"{name}.sbatch").read_text(), re.M)
    )
    gpus = {"gpus-per-task": str(needs.gpus)} if needs.gpus else {}
    assert asked == {"time": needs.time, "cpus-per-task": str(needs.cpus), "mem": f"{needs.mem_gb}G", **gpus}


@pytest.mark.parametrize("name", registry.names("tribunal.datasets"))
def test_a_dataset_is_one_file_with_one_class(name: str):
    module = registry.load("tribunal.datasets", name, "dataset")
    assert issubclass(module.Dataset, DatasetConfig)
    assert module.__doc__
