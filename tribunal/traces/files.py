"""``traces.jsonl`` read on demand: only the keys and places of the traces are held, so length costs no memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from tribunal.core.errors import DataError
from tribunal.core.records import Trace
from tribunal.core.storage import storage_errors


class TraceFile:
    """The traces of a finished job, by their number in the file.

    Attributes:
        keys: ``problem_id/sample`` of each trace, in the order of the file.

    Raises:
        DataError: a line is not a trace, or a trace is there twice; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[str] = []
        self._offsets: list[int] = []
        lines: dict[str, int] = {}
        offset = 0
        with storage_errors(path, "read"), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    fields = json.loads(line)
                    key = f"{fields['problem_id']}/{fields['sample']}"
                except (ValueError, KeyError, TypeError):
                    raise DataError(f"{path}, line {number}: not a trace; run generate_traces again") from None
                if key in lines:
                    raise DataError(f"{path}, line {number}: trace {key} is there already in line {lines[key]}; run generate_traces again")
                lines[key] = number
                self.keys.append(key)
                self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, numbers: Iterable[int]) -> Iterator[Trace]:
        """These traces, one at a time, from the disk."""
        with storage_errors(self.path, "read"), self.path.open("rb") as file:
            for number in numbers:
                file.seek(self._offsets[number])
                try:
                    yield Trace.model_validate_json(file.readline())
                except ValidationError as error:
                    first = error.errors()[0]
                    field = ".".join(map(str, first["loc"]))
                    raise DataError(f"{self.path}, line {number + 1}: {field}: {first['msg']}; run generate_traces again") from None
