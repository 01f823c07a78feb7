"""The text of a completion while it is being generated, and its sentences as soon as they are known to have ended."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from tribunal.core.records import Span
from tribunal.traces.sentences import PARTIAL, Decode, sentence_spans

MARKS = frozenset(".!?…\n。！？|")


class LiveText:
    """Text and sentences of a growing sequence of tokens.

    A sentence has ended once the next one has begun (a letter or a digit behind a mark), so it is told a few tokens late.
    What is told agrees with ``tribunal.traces.sentences`` on the whole text, but for display maths that spans lines: while
    it is open, its lines are taken for sentences. Work per token does not grow with the text.

    Args:
        decode: token ids to text, e.g. ``PromptFormat.decode``.
        tags: the model's thinking tags, which belong to no sentence.
    """

    def __init__(self, decode: Decode, tags: Sequence[str] = ()) -> None:
        self._decode, self._tags = decode, tags
        self._marks = MARKS | {tag[-1] for tag in tags if tag}
        self._ids: list[int] = []
        self._window = self._known = 0  # tokens decoded for context, tokens whose text is out
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._length = 0
        self._tail, self._tail_at = "", 0  # the text since the last line that began before the open sentence
        self._told = 0  # sentences of the tail that were told
        self._marked = False

    def add(self, token: int) -> tuple[str, list[Span]]:
        """What a token adds to the text (nothing while it completes no character), and the sentences now known to have ended."""
        self._ids.append(token)
        piece = self._piece(last=False)
        self._marked = self._marked or not self._marks.isdisjoint(piece)
        if not self._marked or not any(map(str.isalnum, piece)):
            return piece, []
        return piece, self._ended()

    def finish(self) -> tuple[str, list[Span]]:
        """The text held back so far, and the sentences not told yet: the open one ends with the text."""
        piece = self._piece(last=True)
        spans = sentence_spans(self._tail, self._tags)[self._told :]
        self._told += len(spans)
        return piece, [self._span(start, end) for start, end in spans]

    def _piece(self, *, last: bool) -> str:
        before, now = self._decode(self._ids[self._window : self._known]), self._decode(self._ids[self._window :])
        piece = now[len(before) :]
        if not last and (not piece or piece.endswith(PARTIAL)):
            return ""
        new = len(self._ids) - self._known
        self._starts += [self._length] * new
        self._length += len(piece)
        self._ends += [self._length] * new
        self._window, self._known = self._known, len(self._ids)
        self._tail += piece
        return piece

    def _ended(self) -> list[Span]:
        spans = sentence_spans(self._tail, self._tags)
        if len(spans) - 1 <= self._told:
            return []
        ended = [self._span(start, end) for start, end in spans[self._told : -1]]
        self._told = len(spans) - 1
        open_at = spans[-1][0]
        self._marked = not self._marks.isdisjoint(self._tail[open_at:])
        line = self._tail.rfind("\n", 0, open_at) + 1
        if line:
            self._tail, self._tail_at = self._tail[line:], self._tail_at + line
            self._told = sum(start >= line for start, _ in spans) - 1
        return ended

    def _span(self, start: int, end: int) -> Span:
        start, end = start + self._tail_at, end + self._tail_at
        return Span(start_char=start, end_char=end, start_token=bisect_right(self._ends, start), end_token=bisect_left(self._starts, end))
