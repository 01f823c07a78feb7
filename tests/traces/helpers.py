"""Problems and traces over a vocabulary of one token per character."""

from __future__ import annotations

from typing import Any

from tribunal.core.records import Problem, Trace


def problem(identity: str = "p", answer: str = "18", **more: Any) -> Problem:
    return Problem(id=identity, question=f"question {identity}", answer=answer, dataset="test", revision="1", **more)


def trace(response: str, *, problem_id: str = "p", sample: int = 0, thought: str = "", closed: bool = True, finish: str = "stop") -> Trace:
    text = thought + ("</think>" if thought and closed else "") + response
    ids = [ord(character) for character in text]
    return Trace(
        problem_id=problem_id,
        sample=sample,
        prompt_ids=[1],
        completion_ids=ids,
        logprobs=[-0.5] * len(ids),
        finish_reason=finish,
        seed=0,
        readable=len(ids),
        thought=thought,
        thought_end=len(thought) + len("</think>") - 1 if thought and closed else None,
        response=response,
        model="test@1",
        template_sha256="0",
    )


def decode(ids: Any) -> str:
    return "".join(chr(i) for i in ids)
