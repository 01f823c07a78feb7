"""Results folders as jobs leave them, small and made by hand, for the page to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tribunal.core import plots
from tribunal.core.receipts import RECEIPT, digest, hash_outputs
from tribunal.core.records import Gain, Interval, Report, ReportRow
from tribunal.core.reports import write_report
from tribunal.core.storage import read_json, write_json

HOSTILE = "<script>document.title = 'broken'</script> & \"quoted\" it's"
PIPELINES = {"calibrate": ("generate_traces", "label_traces", "train_probes"), "oracle": ("train_oracle", "evaluate_oracle")}


def control(name: str, value: float, half: float = 0.02) -> Interval:
    return Interval(name=name, value=value, low=value - half, high=value + half)


def row(name: str, value: float = 0.9, *, metric: str = "auroc", stratum: str | None = None, gain: float | None = 0.1) -> ReportRow:
    return ReportRow(
        name=name,
        metric=metric,
        value=value,
        low=value - 0.03,
        high=value + 0.03,
        n=1439,
        stratum=stratum,
        controls=[control("length", value - 0.1), control("logprob", value - 0.2), control("bag_of_words", value - 0.3, 0.05)],
        gain=None if gain is None else Gain(over="length", value=gain, low=gain - 0.04, high=gain + 0.04),
    )


def finish(results: Path, job: str, files: Mapping[str, Any] | None = None, *, inputs: Sequence[str] = (), **facts: Any) -> Path:
    """A finished job's folder with JSON files, and a receipt that belongs to them and to its inputs as they are now."""
    folder = results / job
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (files or {}).items():
        write_json(folder / name, value)
    outputs = hash_outputs(folder)
    generation = {"unit": "trace", "units": 12, "seconds": 100.0, "gpus": 0, "ended": 1_800_000_000.0, "shard": "0-of-1"}
    receipt = {
        "schema_version": 1,
        "experiment": results.name,
        "job": job,
        "config": {
            "model": {"name": "Qwen/Qwen3-8B", "revision": "0123456789abcdef", "dtype": "bfloat16"},
            "dataset": {"name": "gsm8k", "path": "/somewhere/secret/test.jsonl", "limit": None},
            "inputs": {need: read_json(results / need / RECEIPT)["digest"] for need in inputs},
        },
        "code": {"version": "0.1.0", "commit": "f" * 40},
        "outputs": outputs,
        "set_aside": [],
        "digest": digest(outputs),
        "hardware": "cpu: test",
        "generations": [generation, generation],
        "totals": {"generations": 2, "seconds": 200.0, "units": 24},
    }
    write_json(folder / RECEIPT, {**receipt, **facts})
    return folder


def measure(results: Path, job: str, rows: Sequence[ReportRow], *, inputs: Sequence[str] = (), figure: bool = False, **facts: Any) -> Path:
    """A finished job with a report, and a figure where one is asked for."""
    folder = results / job
    folder.mkdir(parents=True, exist_ok=True)
    if figure:
        fig, axes = plots.figure(1, 1, width=9, height=4)
        axes[0, 0].plot([0, 1], [0, 1], **plots.series(0))
        plots.save(fig, folder / "the_figure.png")
    report = {
        "verdict": f"The verdict of {job}. It is honest.",
        "not_supported": ["That anything uses it."],
        "figures": ["the_figure.png"] if figure else [],
        **facts,
    }
    write_report(folder, Report(job=job, experiment=results.name, rows=list(rows), **report))
    return finish(results, job, inputs=inputs)


def count(number: int, share: float) -> dict[str, Any]:
    return {"count": number, "share": share, "tokens_mean": 38.2, "tokens_median": 38, "finish": {"length": 0, "stop": number}}


AUDIT = {
    "traces": 1440,
    "problems": 360,
    "problems_with_both": 300,
    "verdicts": {"incorrect": count(596, 0.414), "correct": count(843, 0.585)},
    "strata": {"2 digits": {"correct": count(350, 0.73)}},
    "graders": {"agree": 95, "checked": 96, "differing": []},
    "warnings": ["3.1 % of the traces were cut off"],
}
SUMMARY = {
    **{"problems": 360, "planned": 1440, "attempted": 1440, "dropped": 0, "traces": 1440, "tokens": 62953, "tokens_mean": 43.7},
    "warnings": [],
}


def experiment(folder: Path, *, name: str = "gsm8k-try") -> Path:
    """An experiment with traces, labels, a job of many rows, and one that nobody has heard of; returns its results."""
    results = folder / "results" / name
    finish(results, "generate_traces", {"summary.json": SUMMARY})
    finish(results, "label_traces", {"audit.json": AUDIT}, inputs=["generate_traces"])
    rows = [row("probe chosen in the folds", metric=metric) for metric in ("auroc", "accuracy")]
    rows += [row("probe chosen in the folds", 0.8, stratum=f"{digits} digits") for digits in (2, 3, 4)]
    rows += [row(f"layer {layer}, mean of the logits of every sentence", 0.5 + layer / 40, gain=-0.05) for layer in range(20)]
    measure(results, "train_probes", rows, inputs=["label_traces"], figure=True)
    measure(results, "a_newcomer", [row("what it measures", 0.00002, metric="odd_metric", gain=None)], inputs=["train_probes"])
    return results
