"""Is the oracle's answer right? Exact and fuzzy matches, the choice that an answer names, and oracles that always say the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tribunal.oracle.tasks.task import task_class

ARTICLES = frozenset({"a", "an", "the"})
YES, NO = "yes", "no"
SAID_YES = frozenset({"yes", "y", "true", "correct", "right", "yeah", "yep"})
SAID_NO = frozenset({"no", "n", "false", "incorrect", "wrong", "nope"})
CONSTANT_SHARE = 0.95
DENIAL = re.compile(r"(?<!\w)(not|no|neither|isn t|never)(?!\w)")
NEITHER = re.compile(r"\W*(n\s*/\s*a\b|no\W+(idea|clue|way|answer|information)\b|(yes|no|true|false)\s*(or|and|/)\s*(yes|no|true|false)\b)")
"""How an answer begins that is no yes and no no, though its first word might be one."""


def normalise(text: str) -> str:
    """Lower case, without punctuation, underscores, hyphens and articles; blanks are single. Signs and points of numbers stay."""
    text = text.lower().replace("_", " ")
    text = re.sub(r"(?<!\d)\.(?!\d)|\.(?=\D|$)|(?<=\w)-(?=[^\W\d])|[^\w\s.+\-*/=<>%]", " ", text)
    return " ".join(word for word in text.split() if word not in ARTICLES)


def exact(answer: str, target: str) -> bool:
    """Equal but for blanks at the ends."""
    return answer.strip() == target.strip()


def fuzzy(task: str, answer: str, target: str, choices: Sequence[str]) -> float:
    """How right the answer is, 0 to 1.

    Closed and yes/no tasks: 1 when the choice that the answer names is the target, else 0; case, articles, punctuation and
    near-synonyms of the task's own list do not matter, and an answer that names two choices names none. Open tasks: F1 over
    words, each as often as it occurs.
    """
    return float(said_choice(task, answer, choices) == target) if choices else word_f1(answer, target)


def said_choice(task: str, answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer to a task names, None where it names none: fuzzy matches and macro-F1 both go by it."""
    kind = task_class(task)
    return yes_no(answer) if kind.kind == "yes_no" else named_choice(answer, choices, kind.synonyms)


def named_choice(answer: str, choices: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> str | None:
    """The one choice that an answer names, None where it names none or several.

    An answer that is a choice or its synonym counts as that; otherwise one that holds the words of exactly one choice does,
    and does not deny it: a word like "not" counts as denial unless the answer begins with a choice and a comma, semicolon, point
    or colon ("0, no carry"; "0 is not carried" denies it), or a choice is such a word itself.
    """
    said = normalise(answer)
    names = {choice: [normalise(name) for name in (choice, *(synonyms or {}).get(choice, ()))] for choice in choices}
    for choice, known in names.items():
        if said in known:
            return choice
    spans: list[tuple[int, int, str]] = []
    for choice, known in names.items():
        for name in known:
            spans += [(m.start(), m.end(), choice) for m in re.finditer(_whole(name), said)]
    # "very important" names "high" though "important" alone might too: a name inside a longer one says nothing
    longest = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[1] - o[0] > s[1] - s[0] for o in spans)]
    found = {choice for _, _, choice in longest}
    plain = [normalise(choice) for choice in choices]
    begins = normalise(re.split(r"[,;:]|\.(?!\d)", answer, maxsplit=1)[0]) in plain
    if DENIAL.search(said) and not begins and not any(DENIAL.search(choice) for choice in plain):
        return None
    return found.pop() if len(found) == 1 else None


def _whole(name: str) -> str:
    """A pattern of the name as words of their own; a number neither signed nor part of a decimal or percentage."""
    before = r"(?<![\w.])(?<!(?<!\w)-)" if name[:1].isdigit() else r"(?<!\w)"
    return before + re.escape(name) + (r"(?![\w%]|\.\d)" if name[-1:].isdigit() else r"(?!\w)")


def yes_no(answer: str) -> str | None:
    """``yes`` or ``no`` where the answer begins with one or the like; None where it does not ("no idea", "yes or no")."""
    if NEITHER.match(answer.lower()):
        return None
    words = re.findall(r"[a-z]+", answer.lower())
    first = words[0] if words else ""
    return YES if first in SAID_YES else NO if first in SAID_NO else None


def word_f1(answer: str, target: str) -> float:
    """Harmonic mean of precision and recall over words, counted with their number.

    A text without words (punctuation, an article) is compared as it is, but for case and blanks at its ends: silence is not a comma.
    """
    said, wanted = Counter(normalise(answer).split()), Counter(normalise(target).split())
    if not said or not wanted:
        return float(answer.strip().lower() == target.strip().lower())
    common = sum((said & wanted).values())
    return 2 * common / (sum(said.values()) + sum(wanted.values()))


class Constancy(NamedTuple):
    """The most frequent answer of an oracle, its share, the share of the most frequent target, and the judgement."""

    answer: str
    share: float
    target_share: float
    constant: bool


def constancy(answers: Sequence[str], targets: Sequence[str]) -> Constancy:
    """Whether an oracle says the same to (nearly) every question though the right answers differ."""
    assert len(answers) == len(targets) > 0
    answer, count = Counter(map(normalise, answers)).most_common(1)[0]
    share = count / len(answers)
    target_share = Counter(map(normalise, targets)).most_common(1)[0][1] / len(targets)
    return Constancy(answer, share, target_share, share >= CONSTANT_SHARE and target_share < CONSTANT_SHARE)
