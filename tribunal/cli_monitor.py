"""``tribunal monitor``: watch one completion being written, every sentence under its score; in the terminal and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tribunal.cluster.job import root
from tribunal.core import receipts
from tribunal.core.config import Experiment
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem
from tribunal.core.registry import nearest
from tribunal.core.storage import read_jsonl, write_atomic

if TYPE_CHECKING:
    from tribunal.models.loading import LoadedModel
    from tribunal.probes.direction import Direction, Directions
    from tribunal.probes.monitor import Step
    from tribunal.report.trace_page import Passage

BAR = 10
"""Characters of a full bar."""


@dataclass(frozen=True)
class Place:
    """Which direction to follow; what is not given is the best one's."""

    layer: int | None = None
    pooling: str | None = None
    kind: str | None = None

    @property
    def given(self) -> bool:
        return (self.layer, self.pooling, self.kind) != (None, None, None)


def watch(
    experiment: Experiment,
    *,
    prompt: str | None,
    problem: str | None,
    sample: int,
    place: Place,
    temperature: float | None,
    page: Path | None,
) -> int:
    """Generate one completion with the experiment's model, print it sentence by sentence, and write its page.

    Raises:
        UserError: no question or two of them, an unknown problem, no probes yet, or probes of another model; one line.
    """
    if (prompt is None) == (problem is None):
        raise ConfigError("tribunal monitor wants one question: --prompt TEXT, or --problem ID of the experiment's dataset")
    probes = root() / "results" / experiment.name / "train_probes"
    receipts.require(probes, "tribunal monitor")
    asked = _problem(experiment, problem) if problem is not None else _as_problem(experiment, str(prompt))

    from tribunal.models.loading import load_model
    from tribunal.probes.direction import load
    from tribunal.probes.monitor import Monitor

    directions = load(probes)
    direction, told = _direction(directions, probes, asked, place)
    monitor = Monitor(directions, direction)
    loaded = load_model(experiment.model)
    sampling: Any = experiment.sections["generate_traces"]
    heat = sampling.temperature if temperature is None else temperature
    most = sampling.max_new_tokens
    if loaded.shape.max_positions is not None:
        most = max(1, min(most, loaded.shape.max_positions - len(loaded.format.prompt_ids(asked))))
    steps = monitor.stream(
        loaded,
        asked,
        max_new_tokens=most,
        temperature=heat,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=experiment.seed,
        sample=sample,
    )
    facts = [
        ("model", f"{loaded.name}@{loaded.revision}"),
        ("direction", told),
        ("sampling", f"temperature {heat:g}, seed {experiment.seed}, sample {sample}, at most {most} tokens"),
    ]
    screen = _Screen()
    screen.head(asked.question, facts)
    seen = []
    for step in steps:
        seen.append(step)
        for sentence in step.sentences:
            screen.sentence(sentence.score, sentence.text)
    outcome = _outcome(seen, asked, loaded)
    screen.line(outcome)
    if directions.planted:
        screen.line("The signal is planted by this model's training: a positive control, not evidence about reasoning models.")
    target = page or Path(f"monitor-{experiment.name}.html")
    write_atomic(target, _page(experiment.name, asked.question, facts, seen, direction.threshold, outcome, directions.planted))
    screen.line(f"Page: {target}")
    return 0


def _problem(experiment: Experiment, identity: str) -> Problem:
    problems = {problem.id: problem for problem in experiment.dataset.problems()}
    if identity not in problems:
        raise DataError(f"--problem {identity}: not in the dataset '{experiment.dataset.name}'; {_near(identity, list(problems))}")
    return problems[identity]


def _near(identity: str, known: list[str]) -> str:
    found = nearest(identity, known)
    return found if found.startswith("did you mean") else f"it has {len(known)} problems, the first is '{known[0]}'"


def _as_problem(experiment: Experiment, prompt: str) -> Problem:
    """The problem with this very question, if traces of it were sampled: it has a gold answer, and probes may have seen it."""
    if not prompt.strip():
        raise ConfigError("--prompt: empty; give the question to ask")
    sampled = root() / "results" / experiment.name / "generate_traces" / "problems.jsonl"
    for problem in read_jsonl(sampled, Problem) if sampled.is_file() else []:
        if problem.question.strip() == prompt.strip():
            return problem
    return Problem(id=prompt, question=prompt, answer="", dataset="prompt", revision="none")


def _direction(directions: Directions, probes: Path, asked: Problem, place: Place) -> tuple[Direction, str]:
    """The direction to follow, and how it is told; for a problem that probes were trained on, the one without its fold."""
    from tribunal.probes.held_out import read_held_out

    held_out = read_held_out(probes)
    known = asked.id in held_out.folds
    if known and not place.given:
        direction, note = held_out.direction_of(asked.id), f"fitted without problem {asked.id} and its fold"
    else:
        direction = directions.select(place.layer, place.pooling, place.kind)
        note = f"fitted on problem {asked.id} too, so its score here is optimistic" if known else "fitted on all labelled traces"
    return direction, f"layer {direction.layer}, {direction.pooling}, {direction.kind}; {note}"


def _outcome(steps: list[Step], asked: Problem, loaded: LoadedModel) -> str:
    """How it ended: the last score, and where there is a gold answer, the verdict on the answer."""
    if not steps:
        return "The model ended at once: nothing to read."
    from tribunal.models.generation import Finished
    from tribunal.traces.labels import verdict_of
    from tribunal.traces.sampling import Attempt, make_trace

    last = steps[-1]
    said = f"P(correct) {last.score:.3f} after {len(steps)} tokens"
    if last.finish_reason == "length":
        said += " (cut off by the token limit)"
    if not asked.answer:
        return f"{said}."
    ids = [step.token for step in steps]
    finished = Finished(asked.id, ids, [step.logprob for step in steps], str(last.finish_reason), continued=False)
    name = f"{loaded.name}@{loaded.revision}"
    trace = make_trace(Attempt(asked, 0), loaded.format.prompt_ids(asked), finished, loaded.format, seed=0, model=name)
    verdict, answer = verdict_of(trace, asked)
    return f"{said}. The answer is {answer or 'missing'}: {verdict} (gold: {asked.answer})."


def _page(title: str, question: str, facts: list[tuple[str, str]], steps: list[Step], threshold: float, outcome: str, planted: bool) -> str:
    from tribunal.report.trace_page import TracePage, build

    passages, scores = _passages(steps), [step.score for step in steps]
    return build(TracePage(title, question, facts, passages, scores, threshold, outcome, planted))


def _passages(steps: list[Step]) -> list[Passage]:
    """Sentences and what stands between them, the whole text in order."""
    from tribunal.report.trace_page import Passage

    text, found, place = "".join(step.text for step in steps), [], 0
    for sentence in (sentence for step in steps for sentence in step.sentences):
        start = text.index(sentence.text, place)
        if start > place:
            found.append(Passage(text[place:start]))
        found.append(Passage(sentence.text, sentence.score, sentence.end_token - 1, sentence.logprob))
        place = start + len(sentence.text)
    return [*found, Passage(text[place:])] if place < len(text) else found


class _Screen:
    """Prints to the terminal: colours where there is one that shows them (and NO_COLOR is not set), plain text elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._full, self._empty = ("█", "░") if self._console.encoding.startswith("utf") else ("#", ".")

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def head(self, question: str, facts: list[tuple[str, str]]) -> None:
        for name, value in facts:
            self._console.print(f"{name}: {value}", markup=False, style="dim")
        self._console.print(question, markup=False, style="bold")

    def sentence(self, score: float, text: str) -> None:
        from rich.text import Text

        filled = round(BAR * score)
        colour = f"rgb({round(200 * (1 - score) + 20)},{round(150 * score + 60)},60)"
        bar = Text(f"{score:5.2f} {self._full * filled}{self._empty * (BAR - filled)}  ", style=colour)
        self._console.print(bar.append(" ".join(text.split()), style="default"))
