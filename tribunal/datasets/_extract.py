"""Where a response states its answer: the last box, ``####``, 'the answer is', ``Answer:``."""

from __future__ import annotations

import re

THINK_CLOSE = "</think>"
THINK_OPEN = "<think>"
MOST = 20  # statements of an answer that are looked at, from the last one back


def after_thought(text: str) -> str:
    """What follows the last ``</think>``. A thought that was opened and never closed is not part of the response."""
    return text.rpartition(THINK_CLOSE)[2].partition(THINK_OPEN)[0]


_BOX = re.compile(r"\\f?boxed\s*")


def last_box(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` that is not empty; None where there is none.

    Braces are balanced; a box that never closes reaches to the end of its line.
    """
    text = text[-20_000:]
    for match in reversed(list(_BOX.finditer(text))):
        if text.startswith("{", match.end()):
            content = _balanced(text, match.end())
            if content is None:
                content = re.split(r"\n|\$", text[match.end() + 1 :], maxsplit=1)[0]
        else:  # \boxed 18
            plain = re.match(r"[^\s{}$\\]+", text[match.end() : match.end() + 100])
            content = plain.group() if plain else ""
        if content.strip():
            return content.strip()
    return None


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _balanced(text: str, start: int) -> str | None:
    """The content of the brace group that opens at ``start``; None when it never closes."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : match.start()]
    return None


_HASHES = re.compile(r"####[ \t]*([^\n#]+)")


def hashes(text: str) -> list[str]:
    """What follows each ``####`` on its line, the last one first. A level-4 heading looks the same: the caller tells by content."""
    return [match[1].strip() for match in _HASHES.finditer(text)][: -MOST - 1 : -1]


_PHRASE = re.compile(
    r"""(?: \banswers?\b (?:[^\n.:=?!]|\.(?=\d)){0,60}? (?:\bis\b|\bwas\b|\bequals\b|\b(?:would|will|should|must)\s+be\b|[:=])
          (?!\s*(?:not|never|wrong|incorrect|unknown\s+yet)\b)
        | ^[ \t>*_\#]* (?:final\s+)? \banswer\b [*_\s]* $      # a heading of its own
        | ^[ \t>*_\#]* A[*_]*\s*[:：]                             # Q: ... A: 18
    )""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
_MARKUP = " \t*_:>#="


def phrases(text: str) -> list[str]:
    """The sentence after each 'the answer is', 'Answer:' or 'A:', the last one first."""
    found = []
    for match in reversed(list(_PHRASE.finditer(text))):
        if match.group().strip(_MARKUP + "\n") == "a":  # an article, not a label
            continue
        rest = text[match.end() : match.end() + 1000]
        rest = re.sub(r"^(?:[\s*_:]|\$\$|\\\[)*", "", rest)  # the answer may stand on the next line, in display maths
        sentence = re.split(r"\n|(?<=[^\s.])[.!?](?:\s|$)", rest, maxsplit=1)[0].strip(_MARKUP)
        if sentence:
            found.append(sentence)
        if len(found) == MOST:
            break
    return found


_MATHS = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^$\n]+)\$", re.DOTALL)


def maths(text: str) -> list[str]:
    """Contents of the maths segments, in order."""
    return [next(group for group in match.groups() if group is not None).strip() for match in _MATHS.finditer(text)]


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip(_MARKUP) if lines else ""
