"""What the transfer matrices say: every entry with its interval and controls, heat maps, and a verdict for each axis in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tribunal.core import plots, reports
from tribunal.core.records import Report, ReportRow
from tribunal.core.stats import WITHIN_PROBLEM_PAIRS, Estimate, Resamples
from tribunal.probes.crossfit import Floats, Ints
from tribunal.probes.transfer import CONTROLS, Matrix, Transfer, auroc_by_fold, read_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = dict[str, Any]

FIGURE = "transfer.png"
PLURAL = {"difficulty": "difficulties", "position": "positions", "layer": "layers", "experiment": "experiments"}
RIVALS = ("majority", *CONTROLS)
PROBE, GROUND = "probe", "layer_0"
MOST_WITH_TEXT = 12
DESCRIPTIONS = {
    "majority": "the same score for every trace",
    "length": "number of readable tokens and its logarithm, fitted on the training traces, applied to the test traces",
    "finish": "cut off by the token limit, thought never closed; carried over likewise",
    "logprob": "mean and minimum log-probability of the sampled tokens; carried over likewise",
    "layer_0": "the probe of the same kind after block 0, trained and tested on the same rows",
    "permuted_labels": "ridge, labels permuted within each problem for training and for testing, mean and 95 % range: chance in the "
    "within-problem pairs; its AUROC keeps what tells easy problems from hard ones",
}


class Target(NamedTuple):
    """The test traces of a column."""

    labels: Ints
    clusters: Ints
    folds: Ints


class Scored:
    """One matrix with its numbers; all of them are paired over the same resamples of problems."""

    def __init__(self, transfer: Transfer, matrix: Matrix, records: Mapping[str, Json], parts: Path, resamples: int) -> None:
        self.matrix, self.names = matrix, [kind.name for kind in matrix.kinds]
        self.resamples = Resamples(transfer.problems(matrix), resamples, transfer.own.seed)
        self.targets = []
        for kind in matrix.kinds:
            rows, _ = transfer.rows(matrix, kind)
            first = np.unique(rows.trace, return_index=True)[1]
            self.targets.append(Target(rows.labels[first], self.resamples.index(rows.problems[first].tolist()), rows.folds[first]))
        keys = [matrix.key(kind) for kind in matrix.kinds]
        self.arrays = {i: read_part(records[key], parts) for i, key in enumerate(keys) if key in records}
        self.lost = [name for i, name in enumerate(self.names) if i not in self.arrays]
        self._known: dict[tuple[str, bytes, int], Estimate] = {}

    @property
    def entries(self) -> list[tuple[int, int]]:
        """(trained on, tested on) of everything that was fitted."""
        return [(i, j) for i in self.arrays for j in range(len(self.names))]

    @property
    def crossed(self) -> list[tuple[int, int]]:
        """Entries off the diagonal whose own diagonal is known."""
        return [(i, j) for i, j in self.entries if i != j and j in self.arrays]

    def estimate(self, metric: str, what: str, i: int, j: int) -> Estimate:
        """Of the probe or a control, fitted on kind i, on the traces of kind j."""
        logits = np.zeros(len(self.targets[j].labels)) if what == "majority" else self.arrays[i][f"{what}.{j}"]
        key = metric, logits.tobytes(), j
        if key not in self._known:
            labels, clusters, folds = self.targets[j]
            if metric == WITHIN_PROBLEM_PAIRS:
                self._known[key] = self.resamples.pairs(logits, labels, clusters)
            else:
                self._known[key] = self.resamples.estimate(auroc_by_fold(folds), logits, labels, clusters)
        return self._known[key]

    def controls(self, metric: str, i: int, j: int) -> dict[str, Estimate]:
        """Every control fitted on kind i, on the traces of kind j."""
        arrays = self.arrays[i]
        found = {name: self.estimate(metric, name, i, j) for name in RIVALS if name == "majority" or f"{name}.{j}" in arrays}
        if self.matrix.axis == "layer":
            ground = next((k for k, kind in enumerate(self.matrix.kinds) if kind.layer == 0 and k in self.arrays), None)
            if ground is not None and (i, j) != (ground, ground):
                found[GROUND] = self.estimate(metric, PROBE, ground, ground)
        elif f"{GROUND}.{j}" in arrays:
            found[GROUND] = self.estimate(metric, GROUND, i, j)
        null = arrays.get(f"{'null_pairs' if metric == WITHIN_PROBLEM_PAIRS else 'null_auroc'}.{j}")
        if null is not None:
            found["permuted_labels"] = Estimate(float(np.mean(null[np.isfinite(null)])) if np.isfinite(null).any() else float("nan"), null)
        return found

    def row(self, metric: str, i: int, j: int) -> ReportRow | None:
        """A report row; None where the metric has no value (no problem with right and wrong samples)."""
        estimate = self.estimate(metric, PROBE, i, j)
        if not estimate.known:
            return None
        name = f"{self.matrix.axis}, trained on {self.names[i]}, tested on {self.names[j]}"
        count = len(self.targets[j].labels)
        return reports.row(name, metric, estimate, count, controls=self.controls(metric, i, j), rivals=RIVALS)

    def auroc(self, i: int, j: int) -> Estimate:
        return self.estimate("auroc", PROBE, i, j)

    def gain(self, i: int, j: int) -> Estimate:
        """Over the best control carried over in the same way."""
        controls = self.controls("auroc", i, j)
        best = reports.best_control("auroc", controls, RIVALS)
        assert best is not None, "majority is always there"
        return self.auroc(i, j).minus(controls[best])

    # Averages over what a probe was not trained on --------------------------------------------------------------------------

    def mean(self, value: Callable[[int, int], Estimate]) -> Estimate:
        """Mean over the entries off the diagonal."""
        estimates = [value(i, j) for i, j in self.crossed]
        return Estimate(float(np.mean([e.value for e in estimates])), np.mean([e.draws for e in estimates], axis=0))

    @property
    def transferred(self) -> Estimate:
        return self.mean(self.auroc)

    @property
    def within(self) -> Estimate:
        """Of the probes trained on the very kind that is tested, on the same test traces."""
        return self.mean(lambda i, j: self.auroc(j, j))

    def carried(self, control: str) -> Estimate | None:
        """Mean of a control that was carried over in the same way."""
        there = all(control in self.controls("auroc", i, j) for i, j in self.crossed)
        return self.mean(lambda i, j: self.controls("auroc", i, j)[control]) if there else None

    @property
    def best_carried(self) -> tuple[str, Estimate]:
        found = {name: estimate for name in RIVALS if (estimate := self.carried(name)) is not None and estimate.known}
        name = max(found, key=lambda name: found[name].value)
        return name, found[name]

    def sentence(self) -> str:
        """The verdict on one axis."""
        ours, within = self.transferred, self.within
        (low, high), (rival, theirs) = ours.interval, self.best_carried
        head = f"Between {PLURAL[self.matrix.axis]} ({', '.join(self.names) if len(self.names) <= 6 else len(self.names)}) the probe"
        value = f"AUROC {ours.value:.3f} [{low:.3f}, {high:.3f}] on what it was not trained on, {within.value:.3f} within"
        if high < 0.5:
            return f"{head} does not transfer: its scores point the other way ({value})"
        if low <= 0.5 and within.interval[0] <= 0.5:
            return f"{head} has nothing to transfer: not told from chance even within ({value})"
        if low <= 0.5:
            shown = "does not transfer" if high < (0.5 + within.value) / 2 else "is not shown to transfer"
            return f"{head} {shown}: not told from chance ({value})"
        lost, gain = within.minus(ours), ours.minus(theirs)
        if lost.interval[0] > 0 and high < (0.5 + within.value) / 2:
            how = f"hardly transfers, losing {_points(lost, sign='')}"
        elif lost.interval[0] > 0:
            how = f"transfers at a loss of {_points(lost, sign='')}"
        else:
            how = f"transfers without a measurable loss ({_points(lost, sign='')})"
        if gain.interval[0] > 0:
            over = f"{_points(gain)} over"
        elif gain.interval[1] < 0:
            over = f"worse ({_points(gain)}) than"
        else:
            over = f"no better ({_points(gain)}) than"
        worst = min(self.crossed, key=lambda pair: self.auroc(*pair).value)
        least = f"least from {self.names[worst[0]]} to {self.names[worst[1]]}, {self.auroc(*worst).value:.3f}"
        return f"{head} {how}, {value}; {least}; {over} the best control carried over the same way ({rival}, {theirs.value:.3f})"

    def details(self) -> Json:
        averages = {"transferred": self.transferred, "within": self.within, "loss": self.within.minus(self.transferred)}
        for name in (*RIVALS, GROUND):
            if (estimate := self.carried(name)) is not None:
                averages |= {name: estimate, f"gain_over_{name}": self.transferred.minus(estimate)}
        return {
            "kinds": [kind.__dict__ for kind in self.matrix.kinds],
            "traces": [len(target.labels) for target in self.targets],
            "share_correct": [float(target.labels.mean()) for target in self.targets],
            "auroc": self._table(self.auroc),
            WITHIN_PROBLEM_PAIRS: self._table(lambda i, j: self.estimate(WITHIN_PROBLEM_PAIRS, PROBE, i, j)),
            "off_the_diagonal": {name: _interval(estimate) for name, estimate in averages.items()},
        }

    def _table(self, value: Callable[[int, int], Estimate]) -> list[list[float | None]]:
        """Values, one list for each kind trained on; None where it was set aside."""
        size = range(len(self.names))
        return [[value(i, j).value if i in self.arrays else None for j in size] for i in size]


def _interval(estimate: Estimate) -> Json:
    low, high = estimate.interval
    return {"value": estimate.value, "low": low, "high": high}


def _points(estimate: Estimate, sign: str = "+") -> str:
    low, high = estimate.interval
    return f"{100 * estimate.value:{sign}.1f} points [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _experiments(transfer: Transfer) -> Json:
    """Whose traces they are, and how many problems they share with this experiment's."""
    shared = transfer.shared_problems
    found: Json = {}
    for name, training in {transfer.name: transfer.own, **transfer.others}.items():
        found[name] = {
            "model": training.activations.meta.model,
            "dataset": training.table.dataset,
            "template_sha256": training.table.template_sha256,
            "traces": len(training.table),
            "problems": len(set(training.table.problems)),
        }
        if name in shared:
            found[name]["problems_shared"] = shared[name]
    return found


def _not_supported(transfer: Transfer, scored: Sequence[Scored], *, planted: bool) -> list[str]:
    lines = ["That a direction which transfers is used by the model: nothing was intervened on."]
    if planted:
        lines.append("Anything about reasoning models: the built-in model was trained to notice its slips, so the signal is planted.")
    if not transfer.others:
        lines.append("Transfer to another dataset or model: no other experiment was named (transfer_probes.others).")
    lines.append("Calibration after transfer: AUROC asks for the order alone; thresholds and P(correct) may be off.")
    lines.append("A comparison with bag of words or question only: they were not carried over (train_probes has them within).")
    if not any(matrix.matrix.axis == "difficulty" for matrix in scored):
        lines.append("Transfer between difficulties: fewer than two strata can carry a probe.")
    lines += [f"Transfer from or to {name}: {reason}." for name, reason in transfer.left_out.items()]
    lines += [
        f"Transfer from {name} ({one.matrix.axis}): its fit ended the process and was set aside." for one in scored for name in one.lost
    ]
    return lines


def publish(
    transfer: Transfer, records: Mapping[str, Json], out: Path, *, parts: Path, experiment: str, resamples: int, planted: bool
) -> None:
    """Write report.json and transfer.png into ``out``."""
    scored = [Scored(transfer, matrix, records, parts, resamples) for matrix in transfer.matrices]
    told = [one for one in scored if one.crossed]
    sentences = [one.sentence() for one in told] or ["Every fit ended the process and was set aside: nothing was measured"]
    if planted:
        sentences[-1] += "; the signal is planted by this model's training (a positive control for the pipeline)"
    rows = [one.row(metric, i, j) for one in scored for metric in ("auroc", WITHIN_PROBLEM_PAIRS) for i, j in one.entries]
    title = f"{experiment}: trained on one kind, tested on another" + ("  (planted signal)" if planted else "")
    draw(told, out / FIGURE, title=title)
    place = transfer.place
    report = Report(
        job="transfer_probes",
        experiment=experiment,
        verdict=". ".join(sentences) + ".",
        not_supported=_not_supported(transfer, scored, planted=planted),
        figures=[FIGURE],
        rows=[row for row in rows if row is not None],
        details={
            "place": {"layer": place.layer, "pooling": place.pooling, "kind": place.kind},
            "matrices": {one.matrix.axis: one.details() for one in told},
            "experiments": _experiments(transfer),
            "how": "every entry, the diagonal too, is cross-fitted over the same folds by problem; a problem that two experiments share "
            "lies in one fold, so no probe saw it; an AUROC counts pairs that one fold's probe scored; traces with several rows are scored "
            "by the mean of their logits",
            "fits": {
                key: {name: value for name, value in record.items() if name not in ("file", "sha256")} for key, record in records.items()
            },
            "controls": DESCRIPTIONS,
            "planted": planted,
        },
    )
    reports.write_report(out, report)


def draw(scored: Sequence[Scored], path: Path, *, title: str) -> None:
    """For every matrix a heat map of AUROC, and below it one of the gain over the best control carried over."""
    sizes = [min(max(len(one.names), 3), MOST_WITH_TEXT) for one in scored] or [3]
    options = {"width": 1.0 + sum(1.4 + 0.75 * size for size in sizes), "height": 2.4 + 1.25 * max(sizes)}
    figure, axes = plots.figure(2, len(sizes), **options, gridspec_kw={"width_ratios": sizes})
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for column, one in enumerate(scored):
        values = _grid(one, one.auroc)
        low = min(0.5, float(np.nanmin(values[0])))
        _heat(axes[0, column], one, values, f"{one.matrix.axis}: AUROC", {"cmap": "cividis", "vmin": low, "vmax": 1.0}, ".2f")
        gains = _grid(one, one.gain)
        most = max(float(np.nanmax(np.abs(gains[0]))), 0.01)
        _heat(axes[1, column], one, gains, "gain over best control", {"cmap": "PuOr", "vmin": -most, "vmax": most}, "+.2f")
    plots.save(figure, path)


def _grid(one: Scored, value: Callable[[int, int], Estimate]) -> Floats:
    """Value, low and high of every entry, [3, trained on, tested on]."""
    grid = np.full((3, len(one.names), len(one.names)), np.nan)
    for i, j in one.entries:
        estimate = value(i, j)
        grid[:, i, j] = estimate.value, *estimate.interval
    return grid


def _heat(axes: Axes, one: Scored, grid: Floats, title: str, look: Json, form: str) -> None:
    axes.imshow(grid[0], aspect="auto", **look)
    axes.grid(False)
    names = [name.removeprefix("layer ") for name in one.names] if one.matrix.axis == "layer" else one.names
    every = len(names) // MOST_WITH_TEXT + 1
    places = range(0, len(names), every)
    axes.set_xticks(
        places, names[::every], rotation=40 if max(map(len, names)) > 4 else 0, ha="right" if max(map(len, names)) > 4 else "center"
    )
    axes.set_yticks(places, names[::every])
    plots.tidy(axes, title, "tested on", "trained on")
    if len(names) > MOST_WITH_TEXT:
        return
    middle = (look["vmin"] + look["vmax"]) / 2
    for i, j in one.entries:
        value, low, high = grid[:, i, j]
        if look["cmap"] == "PuOr":
            colour = "white" if abs(value) > 0.6 * look["vmax"] else plots.DARK
        else:
            colour = plots.DARK if value > middle else "white"
        text = f"{value:{form}}\n[{low:{form}}, {high:{form}}]" if np.isfinite(value) else ""
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=6.5, fontweight="bold" if i == j else "normal")
