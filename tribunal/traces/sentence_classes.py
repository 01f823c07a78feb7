"""What each sentence of a trace does: eight classes, by rules or by a judge model.

A rule that does not apply says nothing (None), and a judge's answer that cannot be read is an error. Neither ever becomes a
class of its own accord: a fallback to one class is how published labels came to hold mostly that class.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tribunal.core.records import Problem, TraceLabel
from tribunal.models.judge import CutOff, Judge, JudgeError
from tribunal.traces.sentence_labels import CLASSES

SENTENCES_PER_QUESTION = 20
CONTEXT_SENTENCES = 5

_PATTERNS = {
    "final_answer_emission": (
        r"\\boxed|^\W*(final )?answer\s*:",
        r"\b(final|correct) answer\b|\bthe answer (is|should be|must be)\b",
    ),
    "uncertainty_management": (
        r"^\W*(but |oh,? |no,? )?(wait|hmm+|hold on|actually|alternatively|maybe|perhaps|hang on|on second thought)\b",
        r"\bi('m| am) (not sure|confused|unsure)\b|\bnot (entirely |quite )?sure\b|\bi (made|might have made) a mistake\b",
        r"\bthat('s| is) not right\b|\bdoesn'?t (make sense|seem right)\b",
        r"\blet me (reconsider|rethink|re-?evaluate|start over|try again)\b",
    ),
    "self_checking": (
        r"\b(double[- ]?check|check(ing)?|verif(y|ies|ied|ying)|make sure|to be sure|confirm(s|ed)?|sanity)\b",
        r"\bplug(ging)? (it |this |that |them )?back\b",
    ),
    "problem_setup": (
        r"\bthe (problem|question|task) (is|asks|says|states|wants|gives)\b|^\W*(okay|ok|alright),? so\b|\bgiven that\b",
        r"\b(we|i)('re| are|'m| am) (given|told|asked)\b|\bi need to (find|determine|figure out|calculate) (out )?(how|what|the)\b",
    ),
    "plan_generation": (
        r"^\W*(so |now,? |next,? |okay,? |first(ly)?,? |then,? )*(let me|let'?s|i('ll| will| should| need to| can| could))\b",
        r"^\W*(so |now,? |next,? |okay,? |first(ly)?,? |then,? )*we (need to|should|can|could|will|have to)\b",
        r"\b(my|the) (plan|approach|strategy|idea) (is|would|will)\b",
        r"^\W*(first|firstly|next|the first step|to (solve|find|get|compute|calculate|determine))\b[^=\d]*$",
    ),
    "fact_retrieval": (
        r"\bi (remember|recall|know)\b|\brecall that\b|\bremember that\b|\bby definition\b|\bis (defined as|known)\b|\btheorem\b",
        r"\bthe (formula|rule|identity|definition)\b",
        r"\bthere are \w+ (seconds|minutes|hours|days|weeks|months|inches|feet|cents|grams|met(er|re)s) in\b",
    ),
    "result_consolidation": (
        r"\b(in total|altogether|overall|combining|in summary|to sum(marise|marize)? up)\b",
        r"\b(putting|adding) (it|this|that|everything|these|them) (all )?(together|up)\b",
        r"^\W*(so|therefore|thus|hence|this means|that means)\b[^=+*/×÷]*$",
    ),
    "active_computation": (
        r"\d\s*[-+*/×÷^=]|[=≈]\s*\$?-?\d|\\(frac|times|cdot|div|sqrt)",
        r"\d.*\b(plus|minus|times|divided by|multiplied by|equals|gives|added to|subtracted from|half of|twice)\b",
        r"\b(plus|minus|times|divided by|multiply|subtract|half of|twice)\b.*\d",
    ),
}
"""By class, what its sentences look like; the first class with a match counts."""
_RULES = {name: re.compile("|".join(patterns), re.IGNORECASE) for name, patterns in _PATTERNS.items()}


def by_rules(text: str, label: TraceLabel) -> list[str | None]:
    """The class of each sentence by what it says; the first rule that applies counts, None where none does.

    Args:
        text: the readable completion that the label's characters count in.
    """
    return [_by_rules(text[span.start_char : span.end_char]) for span in label.sentences]


def _by_rules(sentence: str) -> str | None:
    return next((name for name, pattern in _RULES.items() if pattern.search(sentence)), None)


_QUESTION = """Below is part of a chain of thought on a problem. For each numbered sentence, name what it does in the reasoning:
problem_setup: parses or rephrases the task
plan_generation: states or chooses a plan, or reasons about how to go on
fact_retrieval: recalls facts, formulas or details of the problem without computing
active_computation: does algebra or arithmetic towards the answer
result_consolidation: gathers intermediate results or prepares the answer
uncertainty_management: expresses confusion, re-evaluates, backtracks
self_checking: verifies earlier steps
final_answer_emission: states the final answer

Problem:
{problem}

Before:
{before}

Sentences:
{sentences}

Reply with a JSON object and nothing else: for each number its class, like {{"1": "problem_setup", "2": "fact_retrieval"}}."""


def by_judge(text: str, label: TraceLabel, problem: Problem, judge: Judge) -> list[str | None]:
    """The class of each sentence as a judge model says; twenty sentences to a question.

    Raises:
        JudgeError: the judge cannot be reached, or none of its answers to a question names one known class for each sentence.
    """
    sentences = [text[span.start_char : span.end_char] for span in label.sentences]
    classes: list[str | None] = []
    for first in range(0, len(sentences), SENTENCES_PER_QUESTION):
        part = sentences[first : first + SENTENCES_PER_QUESTION]
        question = _QUESTION.format(
            problem=problem.question,
            before=" ".join(sentences[max(0, first - CONTEXT_SENTENCES) : first]) or "(nothing)",
            sentences="\n".join(f"{number}. {' '.join(sentence.split())}" for number, sentence in enumerate(part, 1)),
        )
        classes += _answered(judge, question, len(part), f"trace {label.key}, sentences {first} to {first + len(part) - 1}")
    return classes


def _answered(judge: Judge, question: str, count: int, where: str) -> list[str]:
    complaint = ""
    for attempt in range(judge.attempts):
        try:
            reply = judge.ask(question, attempt)
        except CutOff as error:
            complaint = str(error)
            continue
        try:
            return read_reply(reply, count)
        except ValueError as error:
            complaint = f"{error}; it said {' '.join(reply.split())[-120:]!r}"
    raise JudgeError(
        f"judge {judge.name}: {where}: {complaint} ({judge.attempts} attempts). With more judge.attempts the same command goes on: what is "
        "labelled already is kept. Every other setting of the judge, and classes: rules, is another run: give the experiment another name"
    )


def read_reply(reply: str, count: int) -> list[str]:
    """The classes of sentences 1 to ``count`` in a judge's reply.

    Raises:
        ValueError: it holds no JSON object with a known class for each of them, and nothing else.
    """
    match = re.search(r"\{[^{}]*\}(?![\s\S]*\{)", reply)
    try:
        given: Any = json.loads(match.group()) if match else None
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ValueError("no JSON object in the reply")
    if set(given) != (wanted := {str(number) for number in range(1, count + 1)}):
        raise ValueError(f"classes for sentences {', '.join(sorted(given))}, wanted {', '.join(sorted(wanted, key=int))}")
    classes = [str(given[str(number)]).strip().lower().replace(" ", "_").replace("-", "_") for number in range(1, count + 1)]
    if unknown := sorted(set(classes) - set(CLASSES)):
        raise ValueError(f"unknown class '{unknown[0]}'")
    return classes
