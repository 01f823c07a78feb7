"""Which option of a multiple-choice problem a response chooses: a letter or an option's text, never the article 'a'."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tribunal.datasets import _extract, _numbers

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 1000  # characters of a sentence or an option that are looked at


def gold_letter(gold: str, choices: Sequence[str]) -> str | None:
    """The letter of a gold answer given as 'B', '(B)', 'B.' or as the option's text."""
    text = gold.strip()
    match = re.fullmatch(r"\(?([A-Za-z])\)?\.?", text)
    if match and match[1].upper() in LETTERS[: len(choices)] and text not in choices:
        return match[1].upper()
    return _by_text(text, choices)


def chosen(response: str, choices: Sequence[str]) -> str | None:
    """The letter a response (its thought taken off) chooses, or None when it commits to none or to several."""
    if (box := _extract.last_box(response)) is not None:
        return _read(box, choices, whole=True)
    for sentence in _extract.phrases(response):
        if not _lists_options(response, sentence) and (letter := _read(sentence, choices, whole=False)):
            return letter
        if _hedged(sentence, choices):
            return None
    if marks := _extract.hashes(response):
        letter = _read(marks[0], choices, whole=True)
        if letter:
            return letter
    return _unmarked(response, choices)


def _lists_options(response: str, sentence: str) -> bool:
    """Whether 'A: ...' is the first line of a list of options that goes on with 'B: ...'."""
    return bool(
        re.search(r"^\s*A\s*:\s*" + re.escape(sentence[:60]), response, re.MULTILINE) and re.search(r"^\s*B\s*:", response, re.MULTILINE)
    )


_HEDGE = re.compile(r"\(?\b([A-Z])\b\)?,?\s*(?:or|and|/|&|,)\s*(?:option\s+|choice\s+)?\(?\b([A-Z])\b\)?")


def _hedged(text: str, choices: Sequence[str]) -> bool:
    return any(a in LETTERS[: len(choices)] and b in LETTERS[: len(choices)] and a != b for a, b in _HEDGE.findall(_plain(text)))


def _plain(text: str) -> str:
    return re.sub(r"[*_`]+", "", _numbers.clean(text[:LONGEST])).strip()


# what may follow a bare 'A' or 'I' that is a letter and not a word
_AFTER_LETTER = r"(?=\s*$|\s*[.:;,)\-(]|\s+(?:because|since|as|which|that|is|was|for|due|based|given|\(|-))"


def _read(text: str, choices: Sequence[str], *, whole: bool) -> str | None:
    """The choice that a box (``whole``) or the sentence after 'the answer is' names."""
    plain = _plain(text)
    if _hedged(plain, choices):
        return None
    if letter := _by_text(plain, choices):
        return letter
    known = LETTERS[: len(choices)]
    naming = r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|letter)\s*(?:is\s*)?:?\s*)?"
    match = re.match(rf"{naming}[(\[{{]\s*([A-Za-z])\s*[)\]}}]", plain, re.IGNORECASE)
    if match and match[1].upper() in known:
        return match[1].upper()
    match = re.fullmatch(rf"{naming}([A-Za-z])[.):]?", plain, re.IGNORECASE)
    if match and match[1].upper() in known:
        return match[1].upper()
    match = re.match(rf"(?i:{naming})([A-Z])(?![\w'’])", plain)
    if match and match[1] in known:
        named = match.start(1) > 0  # 'option A', not a sentence that begins with the article
        if named or match[1] not in "AI" or re.match(_AFTER_LETTER, plain[match.end() :]):
            return match[1]
    if whole:
        return None
    return _named_inside(plain, choices)


def _named_inside(text: str, choices: Sequence[str]) -> str | None:
    """The one option that a sentence names: '(B)', 'option B', or one option's text."""
    known = LETTERS[: len(choices)]
    letters = {match[1] or match[2] for match in re.finditer(r"\(([A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Z])\b", text)}
    if letters:
        return letters.pop() if len(letters) == 1 and letters <= set(known) else None
    low = f" {_words(text)} "
    found = [index for index, choice in enumerate(choices) if (words := _words(choice)) and f" {words} " in low]
    # an option whose text is part of another named option does not count: 'red' in 'red wine'
    longest = [i for i in found if not any(i != j and f" {_words(choices[i])} " in f" {_words(choices[j])} " for j in found)]
    return known[longest[0]] if len(longest) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:[.+/^-]\w+)*|[^\w\s]", _plain(text).casefold().rstrip(".!? ")))


def _by_text(text: str, choices: Sequence[str]) -> str | None:
    same = [index for index, choice in enumerate(choices) if _words(choice) == _words(text) and _words(text)]
    return LETTERS[same[0]] if len(same) == 1 else None


_SAID = re.compile(
    rf"""\(?\b(?P<before>[A-Z])\b\)?\s+is\s+(?:the\s+)?(?:correct|right|answer|best)
       | \b(?i:(?:option|choice)\s*(?:is|:|would\s+be)|choose|pick|select|go\s+with)\s+
         (?i:option\s+|choice\s+)?\(?(?P<after>[A-Z])\)?(?![\w'’]){_AFTER_LETTER}""",
    re.VERBOSE,
)


def _unmarked(response: str, choices: Sequence[str]) -> str | None:
    """No marker: a line that is just a letter, an '(B)' or 'option B' in the last lines, an option's text in the last one."""
    known = LETTERS[: len(choices)]
    lines = [line for line in response.strip().splitlines() if line.strip()]
    for line in lines[::-1][:3]:
        plain = _plain(line[-LONGEST:])
        if _hedged(plain, choices):
            return None
        match = re.fullmatch(r"\(?([A-Z])\)?[.:]?", plain) or re.match(r"([A-Z])[.):](?=\s)", plain)
        if match and match[1] in known:
            return match[1]
        match = _SAID.search(plain)
        if match and (said := match["before"] or match["after"]) in known:
            return said
        if letter := _named_inside(plain, choices):
            return letter
    return None
