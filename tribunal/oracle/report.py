"""What evaluate_oracle writes: report.json, items.jsonl with every answer to every question, and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tribunal.core.errors import DataError
from tribunal.core.reports import write_report
from tribunal.core.stats import Resamples
from tribunal.core.storage import write_jsonl
from tribunal.core.work import Json
from tribunal.oracle import figures
from tribunal.oracle.evaluation import BEST, CONDITIONS, PROBE_ITEMS, OracleEvaluation, Who
from tribunal.oracle.probe import ProbeAnswer
from tribunal.oracle.scoring import exact, fuzzy
from tribunal.oracle.settings import OracleFacts
from tribunal.oracle.verdict import TaskAnswers, TaskScores, make_report

CONTROLS = {
    "majority": "the most frequent target of the training examples, and of two answers their shares as log-odds",
    "text_only": "an adapter trained on and asked the same prompts, placeholders included, with nothing injected",
    "shuffled": "the same adapter with the activations of another problem's item of the same task",
    "zeroed": "the same adapter asked the same prompts with nothing injected",
    "linear_probe": "logistic or ridge probe on the same activations and split, one for each set of layers and, on yes/no tasks where the "
    f"log-loss of all validation examples is lower so, for each question; at most {PROBE_ITEMS} training examples of a task, evenly spaced",
}


def publish(evaluation: OracleEvaluation, out: Path, *, records: Mapping[str, Json], bootstrap: int, experiment: str) -> None:
    """Put the answers together and write everything.

    Args:
        records: of the units, by key; those that were set aside are missing.
    Raises:
        DataError: answers of the oracle or of a control are missing.
    """
    answers = {task: collect(evaluation, task, records) for task in evaluation.items}
    problems = {item.group for items in evaluation.items.values() for item in items}
    resamples = Resamples(sorted(problems), bootstrap, evaluation.seed)
    scores = [TaskScores(one, resamples) for given in answers.values() for one in given]
    missing = [f"{who.name} on {task}" for who in evaluation.others for task in answers if who not in [one.who for one in answers[task]]]
    facts = evaluation.facts
    report = make_report(
        scores,
        job="evaluate_oracle",
        experiment=experiment,
        planted=facts.planted,
        control=about_text_only(facts),
        layers=sorted({layer for items in evaluation.items.values() for item in items for layer in item.layers}),
        figure=figures.RESULTS,
        best=facts.best_step,
        set_aside=missing,
        details={
            "best_step": facts.best_step,
            "steps_trained": facts.steps,
            "text_only_steps": facts.text_only_steps,
            "bootstrap": bootstrap,
            "planted": facts.planted,
            "controls": CONTROLS,
        },
    )
    title = f"{experiment}: what the oracle reads" + ("  (planted signals: a positive control)" if facts.planted else "")
    headlines = [one.headline for one in scores if one.who == BEST]
    figures.results(headlines, report.details["steps"], out / figures.RESULTS, title=title)
    write_jsonl(out / "items.jsonl", (row for given in answers.values() for row in item_rows(given)))
    write_report(out, report)


def about_text_only(facts: OracleFacts) -> list[str]:
    """What the control text_only does not show of this oracle."""
    if not facts.text_only_steps:
        return ["A comparison with an adapter trained without activations: train_oracle.text_only_steps is 0."]
    lines = []
    if facts.text_only_steps < facts.steps:
        lines.append(f"What text_only would reach if it were trained as long: {facts.text_only_steps} steps, the oracle {facts.steps}.")
    if facts.start_from is not None:
        lines.append(f"That text_only knows no activation: like the oracle it started from {facts.start_from}, which may have seen some.")
    return lines


def collect(evaluation: OracleEvaluation, task: str, records: Mapping[str, Json]) -> list[TaskAnswers]:
    """All that was said to a task's items, by the best checkpoint first; without all of its own controls another adapter is left out."""
    items, pair = evaluation.items[task], evaluation.pair(task)
    said: dict[str, Sequence[ProbeAnswer]] = {}
    for condition in (*evaluation.conditions, *(["linear_probe"] if task in evaluation.probed else [])):
        found = evaluation.answers(records, task, condition)
        if found is None:
            raise DataError(
                f"evaluate_oracle: the answers of {condition} to {task} ended the process and were set aside; nothing is reported"
            )
        said[condition] = found
    said["majority"] = [evaluation.majority(task)] * len(items)
    made = [TaskAnswers(task, items, said, pair)]
    for who in evaluation.others:
        own = {name: found for name in CONDITIONS if (found := evaluation.answers(records, task, name, who)) is not None}
        if len(own) == len(CONDITIONS):
            made.append(TaskAnswers(task, items, {**said, **own}, pair, who))
    return made


def item_rows(given: Sequence[TaskAnswers]) -> Iterator[Json]:
    """A line of items.jsonl for each item: question, target, and what was said by whom under each condition, scored."""
    best, *others = given
    everything = {**best.said, **{_condition(one.who, name): one.said[name] for one in others for name in CONDITIONS}}
    for number, item in enumerate(best.items):
        said = {name: found[number] for name, found in everything.items()}
        yield {
            "key": item.key,
            "task": item.task,
            "problem_id": item.problem_id,
            "group": item.group,
            "sample": item.sample,
            "stratum": item.stratum,
            "tokens": item.tokens,
            "layers": item.layers,
            "question": item.question,
            "target": item.target,
            "answers": {name: answer.text for name, answer in said.items()},
            "log_odds": {name: answer.odds for name, answer in said.items() if answer.odds is not None},
            "exact": {name: exact(answer.text, item.target) for name, answer in said.items()},
            "fuzzy": {name: fuzzy(item.task, answer.text, item.target, item.choices) for name, answer in said.items()},
        }


def _condition(who: Who, name: str) -> str:
    """Of another adapter than the best checkpoint."""
    return who.name if name == "oracle" else f"{who.name}, {name}"
