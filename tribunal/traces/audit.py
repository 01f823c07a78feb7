"""The label audit: counts, lengths and endings by class and stratum, what two graders disagree on, what to worry about."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, median
from typing import Any, Literal, NamedTuple

from tribunal.core.errors import LabelError
from tribunal.core.records import VERDICTS, Problem, Trace, TraceLabel, Verdict
from tribunal.datasets import answers

Json = dict[str, Any]
MOST_TRUNCATED = 0.02
"""Above this share of truncated traces the kept ones are a selection (the short ones), so the audit warns first thing."""


class Facts(NamedTuple):
    """What the audit keeps of a trace; small, so that ten thousand long traces need not be held."""

    problem_id: str
    verdict: Verdict
    stratum: str | None
    tokens: int
    finish: Literal["stop", "length"]


def facts(trace: Trace, label: TraceLabel) -> Facts:
    return Facts(trace.problem_id, label.verdict, label.stratum, trace.readable, trace.finish_reason)


def audit(rows: Sequence[Facts], graders: Json | None = None) -> Json:
    """The content of ``audit.json``.

    Args:
        rows: one per trace.
        graders: the outcome of ``cross_check``.
    """
    strata = defaultdict(list)
    by_problem = defaultdict(set)
    for row in rows:
        strata[row.stratum].append(row)
        by_problem[row.problem_id].add(row.verdict)
    named = {stratum: strata[stratum] for stratum in sorted(strata, key=str) if stratum is not None}
    return {
        "warnings": _warnings(rows),
        "traces": len(rows),
        "problems": len(by_problem),
        "problems_with_both": sum({"correct", "incorrect"} <= verdicts for verdicts in by_problem.values()),
        "verdicts": _classes(rows),
        "strata": {stratum: _classes(members) for stratum, members in named.items()},
        "graders": graders,
    }


def _classes(rows: Sequence[Facts]) -> Json:
    classes: Json = {}
    for verdict in VERDICTS:
        members = [row for row in rows if row.verdict == verdict]
        lengths = [row.tokens for row in members]
        finishes = Counter(row.finish for row in members)
        classes[verdict] = {
            "count": len(members),
            "share": round(len(members) / len(rows), 6) if rows else 0.0,
            "tokens_mean": round(mean(lengths), 3) if lengths else None,
            "tokens_median": median(lengths) if lengths else None,
            "finish": {"stop": finishes["stop"], "length": finishes["length"]},
        }
    return classes


def _warnings(rows: Sequence[Facts]) -> list[str]:
    counts = Counter(row.verdict for row in rows)
    warnings = []
    if rows and (share := counts["truncated"] / len(rows)) > MOST_TRUNCATED:
        warnings.append(
            f"{counts['truncated']} of {len(rows)} traces ({share:.1%}) are truncated: what is left over-represents short traces; "
            "raise generate_traces.max_new_tokens"
        )
    if rows and (share := counts["unparsable"] / len(rows)) > MOST_TRUNCATED:
        warnings.append(
            f"{counts['unparsable']} of {len(rows)} traces ({share:.1%}) state no answer that can be compared; "
            "ask for a form of answer with model.prompt_suffix"
        )
    lengths = {verdict: [row.tokens for row in rows if row.verdict == verdict] for verdict in ("correct", "incorrect")}
    if all(lengths.values()):
        right, wrong = (mean(lengths[verdict]) for verdict in ("correct", "incorrect"))
        if max(right, wrong) > 1.5 * max(min(right, wrong), 1e-9):
            warnings.append(
                f"correct traces have {right:.0f} tokens on average, incorrect ones {wrong:.0f}: "
                "read every probe beside the length baseline"
            )
    return warnings


def require_both_classes(rows: Iterable[Facts], min_per_class: int) -> None:
    """Refuse labels that cannot carry a comparison.

    Raises:
        LabelError: fewer than ``min_per_class`` correct or incorrect traces; gives the counts and how to go on.
    """
    counts = Counter(row.verdict for row in rows)
    short = [verdict for verdict in ("correct", "incorrect") if counts[verdict] < min_per_class]
    if short:
        listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        kind = {"correct": "easier", "incorrect": "harder"}[short[0]] if len(short) == 1 else "other"
        raise LabelError(
            f"label_traces: {listed}, but label_traces.min_per_class asks for {min_per_class} {' and '.join(short)}; sample more "
            f"(generate_traces.samples_per_problem, dataset.limit), choose {kind} problems, or lower min_per_class and run again"
        )


def cross_check(pairs: Iterable[tuple[Trace, Problem, TraceLabel]], grader: Callable[[str, str], str] = answers.second_opinion) -> Json:
    """Compare our verdicts on numeric answers with math-verify's own extraction and comparison.

    Args:
        pairs: traces to check; those without a number as gold, and truncated ones, are passed over.
        grader: ``grader(response, gold)`` -> verdict.

    Returns:
        how many were checked, how many agree, and every row on which the two differ.
    """
    checked = 0
    differing = []
    for trace, problem, label in pairs:
        if label.verdict == "truncated" or problem.choices or problem.kind != "question" or not answers.is_number(problem.answer):
            continue
        checked += 1
        other = grader(trace.response, problem.answer)
        if other != label.verdict:
            differing.append(
                {
                    "problem_id": trace.problem_id,
                    "sample": trace.sample,
                    "gold": problem.answer,
                    "answer": label.answer,
                    "verdict": label.verdict,
                    "math_verify": other,
                    "response_end": trace.response[-200:],
                }
            )
    return {"checked": checked, "agree": checked - len(differing), "differing": differing}
