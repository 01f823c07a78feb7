"""The plan of an extraction: which traces, in which shards. A pure function of the trace and label files.

Only keys and byte offsets are held, so memory does not grow with the length of the traces.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from tribunal.core.errors import DataError
from tribunal.core.records import Trace, TraceLabel
from tribunal.core.storage import storage_errors
from tribunal.traces.files import TraceFile


class LabelledTraces:
    """Pairs (trace, label) with one of the wanted verdicts, in the order of ``traces.jsonl``, read on demand.

    Raises:
        DataError: a trace has no label, a label no trace, one is there twice, or no trace has a wanted verdict.
    """

    def __init__(self, traces: Path, labels: Path, verdicts: Collection[str]) -> None:
        self._traces, self._labels = TraceFile(traces), labels
        labelled = _verdicts(labels)
        counts: Counter[str] = Counter()
        self._places: list[tuple[int, int]] = []  # number of the trace, byte offset of its label
        for number, key in enumerate(self._traces.keys):
            if key not in labelled:
                raise DataError(f"{labels}: no label for trace {key}; run label_traces again")
            verdict, offset = labelled.pop(key)
            counts[verdict] += 1
            if verdict in verdicts:
                self._places.append((number, offset))
        if labelled:
            raise DataError(f"{labels}: {len(labelled)} labels without a trace in {traces}, first {min(labelled)}; run label_traces again")
        if not self._places:
            found = ", ".join(f"{verdict} {count}" for verdict, count in sorted(counts.items())) or "no traces at all"
            raise DataError(
                f"{labels}: no trace with verdict {' or '.join(verdicts)} ({found}); set extract_activations.verdicts or sample more"
            )

    def __len__(self) -> int:
        return len(self._places)

    def key(self, number: int) -> str:
        """``problem_id/sample`` of a pair."""
        return self._traces.keys[self._places[number][0]]

    def shards(self, size: int) -> list[range]:
        """Fixed traces to fixed shards of ``size``, in order."""
        return [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def read(self, numbers: range) -> list[tuple[Trace, TraceLabel]]:
        """These pairs, from the disk."""
        places = [self._places[number] for number in numbers]
        labels = []
        with storage_errors(self._labels, "read"), self._labels.open("rb") as file:
            for _, offset in places:
                file.seek(offset)
                labels.append(TraceLabel.model_validate_json(file.readline()))
        return list(zip(self._traces.read(number for number, _ in places), labels))


def _verdicts(path: Path) -> dict[str, tuple[str, int]]:
    """{key: (verdict, byte offset)} of every label."""
    found: dict[str, tuple[str, int]] = {}
    offset = 0
    with storage_errors(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line)
                key, verdict = f"{fields['problem_id']}/{fields['sample']}", fields["verdict"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}, line {number}: not a label; run label_traces again") from None
            if key in found:
                raise DataError(f"{path}, line {number}: a second label of {key}; run label_traces again")
            found[key] = (verdict, offset)
            offset += len(line)
    return found
