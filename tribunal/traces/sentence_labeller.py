"""Makes the labels of one trace's sentences; holds the models that it takes."""

from __future__ import annotations

from typing import Any, Literal

from tribunal.core.config import ModelConfig
from tribunal.core.records import Problem, Trace, TraceLabel
from tribunal.core.work import Checkpoints, Json, Stop
from tribunal.models.describe import load_format
from tribunal.models.judge import Judge, JudgeSettings, open_judge
from tribunal.models.loading import LoadedModel, load_model
from tribunal.models.suppression import Suppression
from tribunal.traces.importance import AnswerTracker, Effect, Rollouts, by_suppression
from tribunal.traces.sentence_classes import by_judge, by_rules
from tribunal.traces.sentence_labels import RolloutSettings


class SentenceLabeller:
    """Labels traces one by one.

    Args:
        model: the model that the traces were sampled from; its weights are loaded only where they are needed.

    Raises:
        JudgeError: the judge cannot be reached.
        ModelError: the model does not take attention suppression.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        seed: int,
        classes: Literal["rules", "judge", "none"],
        judge: JudgeSettings | None,
        importance: Literal["suppression", "rollouts", "none"],
        rollouts: RolloutSettings,
        track_answers: bool,
        lens_layer: int | None = None,
    ) -> None:
        self._decode = load_format(model)[0].decode
        self._classes = classes
        self._judge: Judge | None = open_judge(judge) if classes == "judge" and judge is not None else None
        loaded: LoadedModel | None = load_model(model) if importance != "none" or track_answers else None
        self._suppression = Suppression(loaded.model) if importance == "suppression" and loaded is not None else None
        self._rollouts = Rollouts(loaded, rollouts, seed) if importance == "rollouts" and loaded is not None else None
        self._tracker = AnswerTracker(loaded, lens_layer) if track_answers and loaded is not None else None

    def measure(self, trace: Trace, label: TraceLabel, problem: Problem, stop: Stop, checkpoints: Checkpoints | None = None) -> Json | None:
        """The fields of each sentence's label by name, None where there is nothing to say; None when stopped.

        Raises:
            JudgeError: the judge fails; nothing takes the place of its answer.
        """
        nothing: list[Any] = [None] * len(label.sentences)
        effects = self._measure(trace, label, problem, stop, checkpoints)
        if effects is None:
            return None
        tracked = self._tracker.logprobs(trace, label, problem) if self._tracker is not None else nothing
        return {
            "sentence_class": self._name(trace, label, problem) if self._classes != "none" else nothing,
            "importance": [_rounded(found and found.importance, 9) for found in effects],
            "importance_by_chance": [_rounded(found and found.by_chance, 6) for found in effects],
            "importance_p": [_rounded(found and found.p, 6) for found in effects],
            "answer_logprob": [_rounded(value, 6) for value in tracked],
        }

    def _measure(
        self, trace: Trace, label: TraceLabel, problem: Problem, stop: Stop, checkpoints: Checkpoints | None
    ) -> list[Effect | None] | None:
        if self._suppression is not None:
            return by_suppression(self._suppression, trace, label)
        if self._rollouts is not None:
            return self._rollouts.measure(trace, label, problem, stop, checkpoints)
        return [None] * len(label.sentences)

    def _name(self, trace: Trace, label: TraceLabel, problem: Problem) -> list[str | None]:
        text = self._decode(trace.completion_ids[: trace.readable])
        return by_rules(text, label) if self._judge is None else by_judge(text, label, problem, self._judge)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
