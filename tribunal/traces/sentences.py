"""Sentences of a completion as character and token spans, derived from token ids without tokenising text again."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from tribunal.core.errors import ModelError
from tribunal.core.records import Span

Offsets = list[tuple[int, int]]
Decode = Callable[[Sequence[int]], str]

PARTIAL = "\ufffd"  # what a decoder writes for bytes that are not yet a character
LONGEST_RUN = 64  # tokens of undecodable bytes that are decoded together


class TokenOffsets:
    """Where each token stands in the decoded text. Keeps the text of every token id it has met.

    Linear in the number of tokens: a token's text is decoded once, behind an anchor token, since some decoders drop
    a blank at the start. Tokens that hold parts of one character (byte-level BPE) share that character's span.

    Args:
        decode: token ids to text, e.g. ``PromptFormat.decode``; it may leave tokens out of the text.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._anchor: tuple[int, str] | None = None
        self._pieces: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> tuple[str, Offsets]:
        """The text of ``ids`` and, per token, the span [start, end) of its characters; both ends never decrease.

        Raises:
            ModelError: the decoder's text is not made of its tokens' texts, so that no token has a place.
        """
        self._learn_anchor(ids)
        text = self._decode(ids)
        offsets = self._from_pieces(ids, text)
        return text, offsets if offsets is not None else _streamed(self._decode, ids, text)

    def _from_pieces(self, ids: Sequence[int], text: str) -> Offsets | None:
        """Concatenated token texts; None when they do not make up ``text``."""
        offsets: Offsets = []
        place = index = 0
        while index < len(ids):
            piece = self._decode([ids[index]]) if place == 0 else self._piece(ids[index])
            if PARTIAL in piece:
                spans, piece = self._run(ids, index, first=place == 0)
                offsets += [(place + start, place + end) for start, end in spans]
                index += len(spans)
            else:
                offsets.append((place, place + len(piece)))
                index += 1
            if not text.startswith(piece, place):
                return None
            place += len(piece)
        return offsets if place == len(text) else None

    def _piece(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._behind_anchor([token])
        return piece

    def _behind_anchor(self, ids: Sequence[int]) -> str:
        if self._anchor is None:
            return self._decode(ids)
        anchor, text = self._anchor
        return self._decode([anchor, *ids])[len(text) :]

    def _run(self, ids: Sequence[int], start: int, *, first: bool) -> tuple[Offsets, str]:
        """Tokens from ``start`` on that make whole characters only together: their spans from 0, and their text."""
        ends: list[int] = []
        text = ""
        for stop in range(start + 1, min(start + LONGEST_RUN, len(ids)) + 1):
            tokens = ids[start:stop]
            text = self._decode(tokens) if first else self._behind_anchor(tokens)
            ends.append(len(text.rstrip(PARTIAL)))
            if not text.endswith(PARTIAL):
                break
        ends[-1] = len(text)
        starts = [0, *ends[:-1]]
        for index in range(len(ends) - 2, -1, -1):  # a token without a whole character shares the one it helps to make
            if ends[index] <= starts[index]:
                ends[index] = ends[index + 1]
        return list(zip(starts, ends)), text

    def _learn_anchor(self, ids: Sequence[int]) -> None:
        """Choose the anchor among these ids: the first that is plain text."""
        if self._anchor is None:
            for token in ids:
                text = self._decode([token])
                if text.strip() and PARTIAL not in text:
                    self._anchor = (token, text)
                    return


def _streamed(decode: Decode, ids: Sequence[int], text: str) -> Offsets:
    """Decode in windows that start one step back, for decoders whose text depends on the token before."""
    ends: list[int] = []
    window = known = done = 0
    for stop in range(1, len(ids) + 1):
        before, now = decode(ids[window:known]), decode(ids[window:stop])
        piece = now[len(before) :]
        if piece and (stop == len(ids) or not piece.endswith(PARTIAL)):
            if not text.startswith(piece, done):
                break
            done += len(piece)
            ends += [done] * (stop - known)
            window, known = known, stop
    if done != len(text):
        raise ModelError(
            "the tokenizer's decoder does not give each token a place in the text, so sentences cannot be located; "
            "use a tokenizer whose text is the sequence of its tokens' texts"
        )
    ends += [done] * (len(ids) - known)
    starts = [0, *ends[:-1]]
    for index in range(1, len(ends)):
        if ends[index] == ends[index - 1]:  # the tokens of one group share its span
            starts[index] = starts[index - 1]
    return list(zip(starts, ends))


def token_offsets(decode: Decode, ids: Sequence[int]) -> Offsets:
    """Per token, the span [start, end) of its characters in ``decode(ids)``."""
    return TokenOffsets(decode)(ids)[1]


# --- sentences --------------------------------------------------------------------------------------------------

_ABBREVIATIONS = {
    "approx", "cf", "ca", "dr", "e.g", "eg", "eq", "eqs", "fig", "figs", "i.e", "ie", "incl", "jr", "mr", "mrs", "ms", "mt", "no", "nos",
    "p", "pp", "prof", "resp", "sec", "sr", "st", "u.s", "viz", "vol", "vs", "w.r.t",
}  # fmt: skip
_KEPT_WHOLE = re.compile(
    r"\$\$.{1,4000}?\$\$|\\\[.{1,4000}?\\\]|\\begin\{(\w+\*?)\}.{1,4000}?\\end\{\1\}"  # display maths may hold newlines
    r"|\\\([^\n]{1,1000}?\\\)|(?<![\\$\w])\$(?=\S)[^$\n]{1,400}?(?<=\S)\$(?![\d$])",  # inline maths; '$5 and $6' is money
    re.DOTALL,
)
_END = re.compile(
    r"""(?P<mark>[.!?…]+) (?P<closing>["'”’)\]*_]*) (?=\s|$)      # a mark, perhaps in quotes or bold, then a blank
      | [。！？]+["'”’」』）]*
      | \n+
      | [ ]\|[ ]""",
    re.VERBOSE,
)
_WORD_BEFORE = re.compile(r"[\w.]+$")


def sentence_spans(text: str, tags: Sequence[str] = ("<think>", "</think>")) -> list[tuple[int, int]]:
    """Character spans of the sentences of a text, blanks and separators left out, in order.

    A sentence ends at '.', '!' or '?' before a blank, at a line's end, at ' | ' (the built-in reasoner's step separator;
    not in a table's row) and at a thinking tag. Decimals, common abbreviations, list numbers and maths are not split.
    The unterminated tail is a sentence like the others. Pieces without a letter or a digit are left out.
    """
    whole = [match.span() for match in _KEPT_WHOLE.finditer(text)]
    starts = [start for start, _ in whole]
    cuts = [(match.start(), match.end()) for tag in tags if tag for match in re.finditer(re.escape(tag), text)]
    for match in _END.finditer(text):
        inside = bisect_right(starts, match.start()) - 1
        if inside >= 0 and match.start() < whole[inside][1]:
            continue
        if match["mark"] is not None:
            if _ends_sentence(text, match):
                cuts.append((match.end(), match.end()))
        elif match.group() == " | ":
            line = text.rfind("\n", 0, match.start()) + 1
            if not text.startswith("|", line):
                cuts.append(match.span())
        else:
            cuts.append((match.start() if match.group()[0] == "\n" else match.end(), match.end()))
    spans = []
    begin = 0
    for start, end in [*sorted(cuts), (len(text), len(text))]:
        if start < begin:  # a mark right before a tag or a line's end
            begin = max(begin, end)
            continue
        piece = text[begin:start]
        if re.search(r"[^\W_]", piece):
            left = begin + len(piece) - len(piece.lstrip())
            spans.append((left, left + len(piece.strip())))
        begin = end
    return spans


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    following = text[match.end() : match.end() + 40].lstrip()
    if match["mark"] != ".":
        return not (match["mark"] in ("...", "…") and following[:1].islower())
    if following[:1].islower():
        return False
    line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    if re.fullmatch(r"[\s*_#>-]*\d{1,3}", line):  # '3. Then ...' at a line's start
        return False
    word = _WORD_BEFORE.search(text[max(0, match.start() - 20) : match.start()])
    return word is None or word.group().lower() not in _ABBREVIATIONS


def sentences(text: str, offsets: Offsets, tags: Sequence[str] = ("<think>", "</think>")) -> list[Span]:
    """The sentences of a decoded completion with the tokens that touch them.

    Args:
        text: the decoded completion.
        offsets: per token, its characters in ``text``; see ``TokenOffsets``.
        tags: the model's thinking tags, which belong to no sentence.
    """
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    return [
        Span(start_char=start, end_char=end, start_token=bisect_right(ends, start), end_token=bisect_left(starts, end))
        for start, end in sentence_spans(text, tags)
    ]
