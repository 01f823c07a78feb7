"""From cross-fitted scores to numbers that may be quoted: nested choice, intervals, controls, gains, strata, verdict.

Every estimate comes from one ``Resamples`` over all problems, so a probe and its controls are compared on the same draws,
on the same traces. Multi-row poolings (sentence, token, percentile) are scored per row, each trace counting once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tribunal.core import reports, stats
from tribunal.core.records import Report, ReportRow
from tribunal.core.stats import METRICS, WITHIN_PROBLEM_PAIRS, Estimate, Resamples
from tribunal.probes.baselines import BASELINES, DESCRIPTIONS
from tribunal.probes.crossfit import CellFit, Floats, Ints, Rows, to_traces

MIN_PER_CLASS_IN_STRATUM = 10
NOT_A_READING_OF_THE_TRACE = ("prompt_end",)
CHOSEN = "probe chosen in the folds"


@dataclass(frozen=True)
class Cell:
    """One layer x pooling with everything that was fitted on it."""

    layer: int
    pooling: str
    rows: Rows
    positions: Ints
    fit: CellFit

    def name(self, kind: str, leading: str) -> str:
        return f"layer {self.layer}, {self.pooling}" + ("" if kind == leading else f", {kind}")


@dataclass(frozen=True)
class Scores:
    """Logits of rows, and which traces they are of."""

    logits: Floats
    trace: Ints
    weights: Floats

    def only(self, mask: NDArray[np.bool_]) -> Scores:
        return Scores(self.logits[mask], self.trace[mask], self.weights[mask])


class Evaluation:
    """All numbers of one probe job.

    Args:
        labels_T, problems_T, strata_T, folds_T: per trace; problems as ids.
        controls: out-of-fold logits by control, one per trace.
        cells: what was fitted, in the order of the plan.
        kinds: probe kinds; the first one leads (its cells are the candidates of the nested choice).
    """

    def __init__(
        self,
        *,
        labels_T: Ints,
        problems_T: Sequence[str],
        strata_T: Sequence[str | None],
        folds_T: Ints,
        controls: Mapping[str, Floats],
        cells: Sequence[Cell],
        kinds: Sequence[str],
        resamples: int,
        seed: int,
    ) -> None:
        self.labels, self.folds = labels_T, folds_T
        self.strata = np.array([stratum or "" for stratum in strata_T])
        self.controls, self.cells, self.kinds, self.leading = dict(controls), list(cells), list(kinds), kinds[0]
        self.resamples = Resamples(problems_T, resamples, seed)
        self.problems = self.resamples.index(problems_T)
        self.cell = {(cell.layer, cell.pooling): cell for cell in cells}
        self._known: dict[Any, Estimate] = {}

    # Which cell ---------------------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> list[Cell]:
        """Cells that may be chosen: they read the trace and have exactly one row for every trace; else all that read it."""
        reading = [cell for cell in self.cells if cell.pooling not in NOT_A_READING_OF_THE_TRACE]
        whole = [cell for cell in reading if cell.rows.one_per_trace and len(cell.rows.trace) == len(self.labels)]
        return whole or reading or self.cells

    @cached_property
    def choice_of_fold(self) -> list[Cell]:
        """For each outer fold, the candidate with the best inner AUROC (first on a tie)."""
        table = np.array([cell.fit.fits[self.leading].inner_auroc for cell in self.candidates])
        return [self.candidates[int(np.argmax(column))] for column in table.T]

    @cached_property
    def best(self) -> Cell:
        """The candidate to deploy: best out-of-fold AUROC. Its number is a maximum; the honest one is the nested choice's."""
        return max(self.candidates, key=lambda cell: self.estimate("auroc", self.scores(cell)).value)

    @cached_property
    def nested(self) -> Scores:
        """Scores of the nested choice: fold k's from the cell that was chosen without fold k."""
        logits = np.full(len(self.labels), np.nan)
        for fold, cell in enumerate(self.choice_of_fold):
            scores = self.by_trace(cell)
            mask = self.folds[scores.trace] == fold
            logits[scores.trace[mask]] = scores.logits[mask]
        traces = np.flatnonzero(np.isfinite(logits))
        return Scores(logits[traces], traces, np.ones(len(traces)))

    def scores(self, cell: Cell, kind: str | None = None) -> Scores:
        return Scores(cell.fit.fits[kind or self.leading].logits, cell.rows.trace, cell.rows.weights)

    def control_scores(self, name: str) -> Scores:
        logits = self.controls[name]
        return Scores(logits, np.arange(len(logits)), np.ones(len(logits)))

    def by_trace(self, cell: Cell, kind: str | None = None) -> Scores:
        """Mean of the logits over each trace's rows."""
        logits, traces = to_traces(cell.fit.fits[kind or self.leading].logits, cell.rows)
        return Scores(logits, traces, np.ones(len(traces)))

    # Numbers ------------------------------------------------------------------------------------------------------------

    def estimate(self, metric: str, scores: Scores) -> Estimate:
        key = metric, scores.logits.tobytes(), scores.trace.tobytes()
        if key not in self._known:
            labels, problems = self.labels[scores.trace], self.problems[scores.trace]
            if metric == WITHIN_PROBLEM_PAIRS:
                self._known[key] = self.resamples.pairs(scores.logits, labels, problems)
            else:
                self._known[key] = self.resamples.estimate(METRICS[metric], scores.logits, labels, problems, scores.weights)
        return self._known[key]

    def control_estimates(self, metric: str, scores: Scores, cell: Cell | None, kind: str | None = None) -> dict[str, Estimate]:
        """Every control on the same traces, with the same weights.

        Args:
            cell: whose layer 0, permutation null and random directions to show; the last two are left out of strata.
        """
        found = {
            name: self.estimate(metric, Scores(self.controls[name][scores.trace], scores.trace, scores.weights))
            for name in BASELINES
            if name in self.controls
        }
        if cell is None:
            return found
        ground = self.cell.get((0, cell.pooling))
        if ground is not None and cell.layer != 0:
            at_zero = self.scores(ground, kind) if len(scores.trace) >= len(ground.rows.trace) else self._matching(ground, scores, kind)
            found["layer_0"] = self.estimate(metric, at_zero)
        if metric == "auroc" and len(scores.trace) == len(cell.rows.trace):
            nulls = {"permuted_labels": cell.fit.null_auroc, "random_directions": cell.fit.random_auroc}
        elif metric == WITHIN_PROBLEM_PAIRS and len(scores.trace) == len(np.unique(cell.rows.trace)):
            nulls = {"permuted_labels": cell.fit.null_pairs}
        else:
            nulls = {}
        found.update({name: Estimate(float(np.mean(null)), null) for name, null in nulls.items() if len(null)})
        return found

    def _matching(self, ground: Cell, scores: Scores, kind: str | None) -> Scores:
        """Layer 0 on a part of the traces, by rows or by traces as ``scores`` is."""
        per_row = len(scores.trace) > len(np.unique(scores.trace))
        base = self.scores(ground, kind) if per_row or ground.rows.one_per_trace else self.by_trace(ground, kind)
        return base.only(np.isin(base.trace, scores.trace))

    def row(
        self, name: str, metric: str, scores: Scores, cell: Cell | None, *, kind: str | None = None, stratum: str | None = None
    ) -> ReportRow | None:
        """A report row; None where the metric has no value there (one class only, no pairs)."""
        estimate = self.estimate(metric, scores)
        if not estimate.known:
            return None
        controls = self.control_estimates(metric, scores, cell, kind)
        rivals = () if metric == "ece" else BASELINES  # a constant is calibrated, so a gain in ECE over it says nothing
        return reports.row(name, metric, estimate, len(scores.trace), controls=controls, rivals=rivals, stratum=stratum)

    def strata_of(self, scores: Scores) -> list[tuple[str, Scores]]:
        """The scores within each stratum that has enough traces of both classes."""
        found = []
        for stratum in sorted({*self.strata.tolist()} - {""}):
            part = scores.only(self.strata[scores.trace] == stratum)
            traces = np.unique(part.trace)
            right = int(self.labels[traces].sum())
            if min(right, len(traces) - right) >= MIN_PER_CLASS_IN_STRATUM:
                found.append((stratum, part))
        return found

    def rows(self) -> list[ReportRow]:
        """The report's rows: the nested choice in full, then each cell's AUROC, pairs and strata."""
        rows: list[ReportRow | None] = []
        for metric in (*METRICS, WITHIN_PROBLEM_PAIRS):
            rows.append(self.row(CHOSEN, metric, self.nested, self.best))
        for stratum, part in self.strata_of(self.nested):
            rows.append(self.row(CHOSEN, "auroc", part, self.best, stratum=stratum))
        rows.append(self.row("best of all cells on the same folds (naive maximum)", "auroc", self.scores(self.best), self.best))
        for cell in self.cells:
            for kind in self.kinds:
                rows += self._cell_rows(cell, kind)
        return [row for row in rows if row is not None]

    def _cell_rows(self, cell: Cell, kind: str) -> list[ReportRow | None]:
        name, scores = cell.name(kind, self.leading), self.scores(cell, kind)
        rows = [self.row(name, "auroc", scores, cell, kind=kind)]
        if kind != self.leading:
            return rows
        by_trace = scores if cell.rows.one_per_trace else self.by_trace(cell)
        if not cell.rows.one_per_trace:
            name = f"{name}, mean of logits per trace"
            rows.append(self.row(name, "auroc", by_trace, cell))
        rows.append(self.row(name, WITHIN_PROBLEM_PAIRS, by_trace, cell))
        rows += [self.row(name, "auroc", part, cell, stratum=stratum) for stratum, part in self.strata_of(by_trace)]
        if cell.pooling == "percentile":
            for position in sorted(set(cell.positions.tolist())):
                part = replace(scores.only(cell.positions == position), weights=np.ones(int((cell.positions == position).sum())))
                rows.append(self.row(f"layer {cell.layer}, percentile {position}", "auroc", part, None))
        return rows

    def all_metrics(self, scores: Scores) -> dict[str, dict[str, float]]:
        """Every metric with its interval."""
        found = {}
        for metric in METRICS:
            estimate = self.estimate(metric, scores)
            low, high = estimate.interval
            found[metric] = {"value": estimate.value, "low": low, "high": high}
        return found

    def gains(self, metric: str = "auroc") -> dict[str, dict[str, float]]:
        """The nested choice's gain over every control that is a predictor."""
        ours = self.estimate(metric, self.nested)
        controls = self.control_estimates(metric, self.nested, self.best)
        found = {}
        for name in (*BASELINES, "layer_0"):
            if name in controls:
                gain = reports.gain_over(name, metric, ours, controls[name])
                found[name] = {"value": gain.value, "low": gain.low, "high": gain.high}
        return found

    # In words -----------------------------------------------------------------------------------------------------------

    def verdict(self, *, planted: bool) -> str:
        """One or two sentences with the headline: the gain over the best control that reads no activation."""
        headline = self.row(CHOSEN, "auroc", self.nested, self.best)
        assert headline is not None and headline.gain is not None
        gain, value = headline.gain, f"AUROC {headline.value:.3f} [{headline.low:.3f}, {headline.high:.3f}]"
        rival = f"the best control without activations ({gain.over}, {headline.value - gain.value:.3f})"
        points, span = f"{abs(100 * gain.value):.1f} points", f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        if headline.low <= 0.5:
            return f"The probe chosen inside the folds has {value}: not told from chance. Best without activations: {gain.over}."
        if gain.low > 0:
            compared = f"{points} {span} over {rival}"
        elif gain.high < 0:
            compared = f"{points} {span} below {rival}: what is known without the activations tells more"
        else:
            compared = f"no clear gain ({100 * gain.value:+.1f} points {span}) over {rival}"
        first = f"The probe chosen inside the folds has {value}, {compared}"
        second = self._over_layer_0()
        if planted:
            second += "; the signal is planted by this model's training (a positive control for the pipeline)"
        return f"{first}. {second}."

    def _over_layer_0(self) -> str:
        if self.best.layer == 0:
            return "Its best cell is layer 0 itself: the label may be confounded with how the text ends"
        gain = self.gains().get("layer_0")
        if gain is None:
            return "Layer 0 was not read, so how much of it the text's surface explains is open"
        points = f"{100 * gain['value']:.1f} points [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}] over layer 0"
        if gain["value"] < 0.05 or gain["low"] <= 0:
            return f"Only {points}: the label may be confounded with how the text ends"
        return f"It is {points}, so the network's depth adds to the surface of the text"

    def not_supported(self, *, planted: bool, missing: Sequence[str], unread: Sequence[str] = ()) -> list[str]:
        """What these numbers do not show."""
        lines = ["That the model uses this direction: a label read off the activations is a correlation; nothing was intervened on."]
        if planted:
            lines.append("Anything about reasoning models: the built-in model was trained to notice its slips, so the signal is planted.")
        lines.append("The naive maximum over cells as a score: it was picked on the folds that measure it.")
        lines.append("Transfer to another dataset, model, prompt or sampling temperature: none was tried.")
        if not self.strata_of(self.nested):
            lines.append("That difficulty plays no part: no stratum has enough traces of both classes; see the within-problem pairs.")
        lines += [f"Probes on {reason}." for reason in unread]
        lines += [f"A comparison with {name} ({DESCRIPTIONS[name]}): the traces or layers for it are missing." for name in missing]
        return lines

    def details(self) -> dict[str, Any]:
        """Tables beside the rows: every metric of every probe, choices, nulls, convergence."""
        nested, best = self.estimate("auroc", self.nested), self.estimate("auroc", self.scores(self.best))
        return {
            "choice": {
                "candidates": [cell.name(self.leading, self.leading) for cell in self.candidates],
                "of_fold": [
                    {"layer": cell.layer, "pooling": cell.pooling, "c": dict(enumerate(cell.fit.fits[self.leading].c_of_fold)).get(k)}
                    for k, cell in enumerate(self.choice_of_fold)
                ],
                "best": {"layer": self.best.layer, "pooling": self.best.pooling},
                "optimism_of_the_maximum": best.value - nested.value,
            },
            "gains_in_auroc": self.gains(),
            "probes": [
                {
                    "layer": cell.layer,
                    "pooling": cell.pooling,
                    "kind": kind,
                    "n_rows": len(cell.rows.trace),
                    "n_traces": len(np.unique(cell.rows.trace)),
                    "c": fit.c,
                    "c_of_fold": fit.c_of_fold,
                    "inner_auroc": fit.inner_auroc.tolist(),
                    "newton_steps": fit.newton_steps,
                    "last_newton_step_moved_logits_by": fit.last_move,
                    "metrics": self.all_metrics(self.scores(cell, kind)),
                }
                for cell in self.cells
                for kind in self.kinds
                for fit in (cell.fit.fits[kind],)
            ],
            "control_metrics": {name: self.all_metrics(self.control_scores(name)) for name in self.controls},
            "permutation_test": [
                {
                    "layer": cell.layer,
                    "pooling": cell.pooling,
                    "permutations": len(cell.fit.null_auroc),
                    "ridge_auroc": cell.fit.ridge_auroc,
                    "null_auroc": float(np.mean(cell.fit.null_auroc)),
                    "p": stats.permutation_p(cell.fit.ridge_auroc, cell.fit.null_auroc),
                    "ridge_pairs": cell.fit.ridge_pairs,
                    "null_pairs": float(np.mean(cell.fit.null_pairs)),
                    "p_pairs": stats.permutation_p(cell.fit.ridge_pairs, cell.fit.null_pairs),
                }
                for cell in self.cells
                if len(cell.fit.null_auroc)
            ],
        }

    def report(
        self,
        *,
        job: str,
        experiment: str,
        planted: bool,
        missing: Sequence[str],
        unread: Sequence[str],
        figures: Sequence[str],
        details: Mapping[str, Any],
    ) -> Report:
        return Report(
            job=job,
            experiment=experiment,
            verdict=self.verdict(planted=planted),
            not_supported=self.not_supported(planted=planted, missing=missing, unread=unread),
            figures=list(figures),
            rows=self.rows(),
            details={**details, **self.details()},
        )
