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
from tribunal.oracle.evaluation import PROBE_ITEMS, OracleEvaluation
from tribunal.oracle.probe import ProbeAnswer
from tribunal.oracle.scoring import exact, fuzzy
from tribunal.oracle.verdict import TaskAnswers, TaskScores, make_report


def publish(evaluation: OracleEvaluation, out: Path, *, records: Mapping[str, Json], bootstrap: int, experiment: str) -> None:
    """Put the answers together and write everything.

    Args:
        records: of the units, by key; those that were set aside are missing.
    Raises:
        DataError: answers of the oracle or of a control are missing.
    """
    answers = [collect(evaluation, task, records) for task in evaluation.items]
    problems = {item.group for one in answers for item in one.items}
    resamples = Resamples(sorted(problems), bootstrap, evaluation.seed)
    tasks = [TaskScores(one, resamples) for one in answers]
    facts = evaluation.facts
    report = make_report(
        tasks,
        job="evaluate_oracle",
        experiment=experiment,
        planted=facts.planted,
        text_only=bool(facts.text_only_steps),
        layers=sorted({layer for one in answers for item in one.items for layer in item.layers}),
        figure=figures.RESULTS,
        best=facts.best_step,
        details={
            "best_step": facts.best_step,
            "steps_trained": facts.steps,
            "text_only_steps": facts.text_only_steps,
            "bootstrap": bootstrap,
            "planted": facts.planted,
            "controls": {
                "majority": "the most frequent target of the training examples",
                "text_only": "an adapter trained on and asked the same prompts, placeholders included, with nothing injected",
                "shuffled": "the oracle with the activations of another problem's item of the same task",
                "zeroed": "the oracle asked the same prompts with nothing injected",
                "linear_probe": "logistic or ridge probe on the same activations and split, one for each set of layers, on yes/no tasks one "
                "for each question where validation likes that better; on at most "
                f"{PROBE_ITEMS} training examples of a task, evenly spaced",
            },
        },
    )
    title = f"{experiment}: what the oracle reads" + ("  (planted signals: a positive control)" if facts.planted else "")
    figures.results([task.headline for task in tasks], report.details["steps"], out / figures.RESULTS, title=title)
    write_jsonl(out / "items.jsonl", (row for one in answers for row in item_rows(one)))
    write_report(out, report)


def collect(evaluation: OracleEvaluation, task: str, records: Mapping[str, Json]) -> TaskAnswers:
    """All that was said to a task's items."""
    items = evaluation.items[task]
    conditions = [*evaluation.conditions, *(["linear_probe"] if task in evaluation.probed else [])]
    said: dict[str, Sequence[ProbeAnswer]] = {}
    for condition in conditions:
        found = evaluation.answers(records, task, condition)
        if found is None:
            raise DataError(
                f"evaluate_oracle: the answers of {condition} to {task} ended the process and were set aside; nothing is reported"
            )
        said[condition] = found
    said["majority"] = [ProbeAnswer(evaluation.majority(task), None)] * len(items)
    by_step = {step: found for step in evaluation.other_steps if (found := evaluation.answers(records, task, "oracle", step)) is not None}
    asked = {adapter: evaluation.answers(records, task, "oracle", adapter=adapter) for adapter in evaluation.published}
    published = {adapter: found for adapter, found in asked.items() if found is not None}
    return TaskAnswers(task, items, said, by_step, published, evaluation.pair(task))


def item_rows(answers: TaskAnswers) -> Iterator[Json]:
    """A line of items.jsonl for each item: question, target, and what was said under each condition, scored."""
    for number, item in enumerate(answers.items):
        said = {name: found[number] for name, found in answers.said.items()}
        said |= {f"step_{step}": found[number] for step, found in answers.by_step.items()}
        said |= {f"adapter {adapter}": found[number] for adapter, found in answers.published.items()}
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
