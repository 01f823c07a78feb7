"""What is fetched before jobs run without network: everything that any section names on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from tribunal.cluster.prefetch import fetch_all
from tribunal.core.config import load_experiment
from tribunal.core.errors import UserError

DEMO = Path(__file__).resolve().parents[2] / "experiments" / "demo.yaml"


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[tuple[str, str | None]]:
    """Names and revisions that the hub was asked for."""
    found: list[tuple[str, str | None]] = []
    fetch = lambda name, revision, allow_patterns: found.append((name, revision)) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return found


def test_models_and_adapters_of_every_section_are_fetched_each_once_at_its_commit(asked, tmp_path):
    overrides = [
        "dataset.per_digits=1",
        "model={name: a/model, revision: r1, adapter: a/lora}",
        "train_oracle.start_from=a/oracle@c1",
        f"evaluate_oracle.published=[a/oracle@c1,b/oracle,{tmp_path}]",
        "label_sentences={classes: judge, judge: {kind: local, local: {name: a/judge, revision: r2}}}",
    ]
    lines = fetch_all(load_experiment(DEMO, overrides))
    assert set(asked) == {("a/model", "r1"), ("a/lora", None), ("a/oracle", "c1"), ("b/oracle", None), ("a/judge", "r2")}
    assert len(asked) == 5 and f"adapter {tmp_path}: a local folder" in lines


def test_an_experiment_that_names_nothing_on_the_hub_asks_nothing_of_it(asked):
    lines = fetch_all(load_experiment(DEMO, ["dataset.per_digits=1"]))
    assert asked == [] and lines[0] == "model builtin:addition: comes with tribunal"


def test_an_adapter_that_cannot_be_had_is_named_with_its_commit_in_one_line(monkeypatch):
    def refuse(name: str, **_: object) -> str:
        raise OSError("no such commit\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"adapter a/oracle at c1 cannot be fetched: no such commit; ") as caught:
        fetch_all(load_experiment(DEMO, ["dataset.per_digits=1", "train_oracle.start_from=a/oracle@c1"]))
    assert "\n" not in str(caught.value)
