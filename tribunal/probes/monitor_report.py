"""What ``monitor_traces`` publishes: report.json with its verdict in words, the figures, and one line per trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from tribunal.core import reports
from tribunal.core.records import Gain, Report, ReportRow
from tribunal.core.stats import Estimate
from tribunal.core.storage import write_jsonl
from tribunal.probes import monitor_figures
from tribunal.probes.crossfit import Floats
from tribunal.probes.early_exit import AT_THE_END, MONITOR, RANDOM, Chosen, EarlyExit
from tribunal.probes.monitor_evaluation import DESCRIPTIONS, RECALIBRATED, MonitorEvaluation, at_share
from tribunal.probes.trace_signals import Signal, SignalPass

Json = dict[str, Any]
TRACES = "monitor.jsonl"
RIVALS = ("logprob", "length", RANDOM)
SAME = 0.1
"""Logits of this pass and of train_probes that differ by more are named: its activations were stored in half precision."""


class Findings:
    """Rows, verdict and details."""

    def __init__(self, evaluation: MonitorEvaluation, plan: SignalPass) -> None:
        self.evaluation, self.plan = evaluation, plan

    @property
    def rows(self) -> list[ReportRow]:
        """The most important ones first."""
        found = self.evaluation
        positions = [row for rows in (found.share_rows, found.token_rows) for part in rows.values() for row in part]
        every = [*positions, *found.decided_rows, *self.exit_rows]
        marked = {f"running score, {percent} % of the trace" for percent in (self._half, found.percents[-1])}
        main = [row for row in every if row.name in marked and row.metric in ("auroc", "brier") and row.stratum is None]
        main += found.decided_rows[:1]
        main += [row for row in self.exit_rows if row.name in (self._within(RECALIBRATED), _equal(RECALIBRATED))]
        return [*main, *(row for row in every if row not in main)]

    @property
    def _half(self) -> int:
        return min(self.evaluation.percents, key=lambda percent: abs(percent - 50))

    def _within(self, policy: str, budget: float | None = None) -> str:
        """A row's name; by default at the budget that is next to one and a half traces."""
        budget = budget or min(self.evaluation.budgets, key=lambda budget: abs(budget - 1.5))
        return f"early exit within {budget:g} traces' tokens, {policy}"

    @cached_property
    def exit_rows(self) -> list[ReportRow]:
        early = self.evaluation.early_exit
        if early is None:
            return []
        rows = []
        for budget in self.evaluation.budgets:
            chosen = {name: early.within_budget(name, budget) for name in early.curves}
            for name in (MONITOR, RECALIBRATED, AT_THE_END):
                where = self._within(name, budget)
                rows.append(self._row(where, "accuracy", name, {key: early.mean(c.right_P) for key, c in chosen.items()}, early))
                rows.append(self._row(where, "tokens_in_traces", name, {key: early.share(c.tokens_P) for key, c in chosen.items()}, early))
        return [*rows, *self._equal_rows(early)]

    def _equal_rows(self, early: EarlyExit) -> list[ReportRow]:
        """Early exit against the same monitor that judges whole traces only; a policy that is never as accurate saves nothing."""
        reference = self.reference(early)
        chosen = {name: early.as_right_as(name, reference) for name in early.curves if name != AT_THE_END}
        saved = {name: _one_minus(early.share(c.tokens_P, reference.tokens_P)) for name, c in chosen.items()}
        change = {name: early.mean(c.right_P - reference.right_P) for name, c in chosen.items()}
        rows = []
        for name in (MONITOR, RECALIBRATED):
            rows.append(self._row(_equal(name), "tokens_saved", name, saved, early))
            rows.append(self._row(_equal(name), "accuracy_change", name, change, early))
        return rows

    def reference(self, early: EarlyExit) -> Chosen:
        return early.judged_at_the_end(self.evaluation.threshold_logit)

    def _row(self, where: str, metric: str, name: str, estimates: Mapping[str, Estimate], early: EarlyExit) -> ReportRow:
        controls = {rival: estimates[rival] for rival in RIVALS if rival in estimates}
        rivals = RIVALS if metric == "accuracy" else ()
        return reports.row(where, metric, estimates[name], len(early.problems), controls=controls, rivals=rivals)

    # In words -----------------------------------------------------------------------------------------------------------

    def verdict(self) -> str:
        found = self.evaluation
        middle, end = (found.share_rows[percent][0] for percent in (self._half, found.percents[-1]))
        rivals = [control for control in end.controls if end.gain and control.name == end.gain.over]
        last = f"at {found.percents[-1]} % {_number(end)}" + "".join(f" ({control.name} {control.value:.3f})" for control in rivals)
        lines = [f"At {self._half} % of a trace the running score has AUROC {_number(middle)}, {_compared(middle)}; {last}"]
        decided = found.decided_rows[0]
        span = f"[{100 * decided.low:.0f}, {100 * decided.high:.0f}]"
        lines.append(f"On average its verdict is final after {100 * decided.value:.0f} % of the trace {span}")
        lines += self._exit_words()
        if self.plan.planted:
            lines[-1] += "; the signal is planted by this model's training (a positive control for the pipeline)"
        return ". ".join(lines) + "."

    def _exit_words(self) -> list[str]:
        early = self.evaluation.early_exit
        if early is None:
            return ["Early exit was not measured: no problem has two samples"]
        rows = {(row.name, row.metric): row for row in self.exit_rows}
        row = rows[self._within(RECALIBRATED), "accuracy"]
        first = (
            f"{self._within(RECALIBRATED).capitalize()} by position: {_percent(row)} right, {_compared(row)}; "
            f"one sample is right in {100 * early.right_P.mean():.1f} %"
        )
        reference = self.reference(early)
        price = _in_traces(early, reference.tokens_P)
        whole = f"judging whole traces ({100 * reference.right_P.mean():.1f} % right for the tokens of {price:.2f} traces)"
        if not early.as_right_as(RECALIBRATED, reference).threshold_of_fold:
            return [first, f"At no threshold is it as accurate as {whole}, so it saves no tokens there"]
        saved, change = rows[_equal(RECALIBRATED), "tokens_saved"], rows[_equal(RECALIBRATED), "accuracy_change"]
        tokens = f"{100 * saved.value:.1f} % [{100 * saved.low:+.1f}, {100 * saved.high:+.1f}] of the tokens"
        moved = f"with accuracy {100 * change.value:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        word = "saves" if saved.low > 0 else "does not clearly save tokens:"
        return [first, f"Against {whole} it {word} {tokens}, {moved}"]

    def not_supported(self, set_aside: int) -> list[str]:
        found, plan = self.evaluation, self.plan
        lines = ["That the model uses this direction: a running score is a reading; nothing was intervened on."]
        if plan.planted:
            lines.append(
                "Anything about reasoning models: the built-in model was trained to notice its slips, so the signal is planted; "
                "and a slip drawn at temperature 1 is an unlikely token, so log-probability finds it as well."
            )
        lines += [
            "Early exit with an intermediate answer: an unfinished trace has no answer here, so to exit is to abandon a sample "
            "and draw another one of the same problem.",
            "A calibrated probability in mid-trace: the direction was fitted on whole traces; see Brier score and ECE by position.",
            f"A choice of layer and pooling that is held out as well: layer {plan.held_out.place.layer}, {plan.pooling} was chosen on all "
            "problems.",
            "A comparison with bag_of_words, question_only and layer_0: see train_probes, which reads whole traces.",
        ]
        if plan.dropped:
            lines.append(
                f"The model's own accuracy and costs under early exit: generate_traces left out {plan.dropped} attempts to meet its "
                "targets, so right and wrong samples are not as frequent here as the model makes them."
            )
        if not found.has_logprobs:
            lines.append("A comparison with logprob: the traces have no log-probabilities.")
        lines += [f"The score at token {position}: {reason}." for position, reason in found.left_out.items()]
        missing = len(plan.traces) - len(found.everything) - set_aside
        if missing:
            lines.append(f"Anything about {missing} traces: they hold nothing to read, or no direction was held out from their problem.")
        if set_aside:
            lines.append(f"Anything about {set_aside} traces whose shard ended the process twice and was set aside.")
        if (difference := self.largest_difference()) is not None and difference > SAME:
            lines.append(
                f"The same score as in train_probes to the last digit: logits differ by up to {difference:.2g} (stored precision)."
            )
        return lines

    def largest_difference(self) -> float | None:
        """Of this pass's logits at a trace's end from those of train_probes; None where those are not of the end."""
        if self.plan.pooling not in ("mean", "last", "last_10"):
            return None
        held = self.plan.held_out.logit
        known = [s for s in self.evaluation.signals if (s.problem_id, s.sample) in held]
        return max((abs(float(s.logits_L[-1]) - held[s.problem_id, s.sample]) for s in known), default=None)

    def details(self) -> Json:
        found = self.evaluation
        place = self.plan.held_out.place
        decided = {
            name: {f"{percent} %": float(np.quantile(shares, percent / 100)) for percent in (10, 25, 50, 75, 90)}
            for name, shares in found.decided.items()
        }
        details: Json = {
            "direction": place.model_dump(),
            "n_traces": len(found.signals),
            "n_problems": len({signal.problem_id for signal in found.signals}),
            "traces_alive": {str(position): len(at.traces_N) for position, at in found.at_tokens.items()},
            "largest_difference_from_train_probes_in_logits": self.largest_difference(),
            "verdict_decided_at_quantiles": decided,
            "signal_curves": found.curves,
            "controls": DESCRIPTIONS,
            "planted": self.plan.planted,
        }
        if (early := found.early_exit) is not None:
            reference = self.reference(early)
            details["early_exit"] = {
                "problems": len(early.problems),
                "policy": "samples of a problem in turn (mean over starting with each); abandoned at the first end of a sentence or of the "
                "trace with a score below the threshold; the last one answers whatever its score; thresholds are chosen for each fold on "
                "the others",
                "tokens_of_one_sample": float(early.one_P.mean()),
                "accuracy_of_one_sample": float(early.right_P.mean()),
                "judging_whole_traces": {
                    "tokens_in_traces": _in_traces(early, reference.tokens_P),
                    "accuracy": float(reference.right_P.mean()),
                },
                "all_samples_then_the_highest_score": {
                    name: {"tokens_in_traces": _in_traces(early, tokens_P), "accuracy": float(right_P.mean())}
                    for name in (MONITOR, "logprob")
                    if name in early.policies
                    for tokens_P, right_P in (early.best_of_all(name),)
                },
                "curves": {
                    name: {
                        "tokens_in_traces": (curve.tokens_PT.mean(0) / early.one_P.mean()).tolist(),
                        "accuracy": curve.right_PT.mean(0).tolist(),
                    }
                    for name, curve in early.curves.items()
                },
            }
        return details


def publish(
    plan: SignalPass, out: Path, *, records: Mapping[str, Json], parts: Path, settings: Mapping[str, Any], experiment: str, seed: int
) -> None:
    """Write monitor.jsonl, the signals, both figures and report.json into ``out``."""
    plan.publish(out, records, parts)
    evaluation = MonitorEvaluation(
        list(plan.signals(records, parts)),
        threshold=plan.directions.select().threshold,
        percents=settings["percents"],
        positions=settings["positions"],
        budgets=settings["budgets"],
        resamples=settings["bootstrap"],
        seed=seed,
    )
    write_jsonl(out / TRACES, _lines(evaluation))
    findings = Findings(evaluation, plan)
    title = f"{experiment}: scores while the trace is being written" + ("  (planted signal: a positive control)" if plan.planted else "")
    figures = monitor_figures.draw(evaluation, out, title=title)
    set_aside = sum(len(shard) for shard in plan.shards if plan.key(shard) not in records)
    report = Report(
        job="monitor_traces",
        experiment=experiment,
        verdict=findings.verdict(),
        not_supported=findings.not_supported(set_aside),
        figures=figures,
        rows=findings.rows,
        details=findings.details(),
    )
    reports.write_report(out, report)


def _lines(evaluation: MonitorEvaluation) -> Iterator[Json]:
    number = {(s.problem_id, s.sample): i for i, s in enumerate(evaluation.signals)}
    for signal in evaluation.everything:
        place = number.get((signal.problem_id, signal.sample))
        yield {
            "problem_id": signal.problem_id,
            "sample": signal.sample,
            "verdict": signal.verdict,
            "stratum": signal.stratum,
            "fold": signal.fold,
            "tokens": signal.length,
            "score": _score(signal, signal.length - 1),
            "scores_at_percent": {str(percent): _score(signal, at_share(signal.length, percent)) for percent in evaluation.percents},
            "sentence_scores": [_score(signal, int(end)) for end in signal.ends_S],
            "decided_at": None if place is None else reports.rounded(float(evaluation.decided[MONITOR][place])),
            "file": signal.file,
            "start": signal.start,
        }


def _equal(policy: str) -> str:
    return f"early exit as accurate as judging whole traces, {policy}"


def _score(signal: Signal, token: int) -> float:
    return reports.rounded(float(expit(signal.logits_L[token])))


def _one_minus(estimate: Estimate) -> Estimate:
    return Estimate(1 - estimate.value, 1 - estimate.draws)


def _in_traces(early: EarlyExit, tokens_P: Floats) -> float:
    return float(tokens_P.mean() / early.one_P.mean())


def _number(row: ReportRow) -> str:
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def _percent(row: ReportRow) -> str:
    return f"{100 * row.value:.1f} % [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def _compared(row: ReportRow) -> str:
    """Against the best control, in points."""
    gain: Gain | None = row.gain
    assert gain is not None
    span = f"{100 * gain.value:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    against = f"({gain.over}, {row.value - gain.value:.3f})"
    if gain.low > 0:
        return f"{span} over the best control without activations {against}"
    if gain.high < 0:
        return f"{span}: below the best control without activations {against}"
    return f"no clear gain ({span}) over the best control without activations {against}"
