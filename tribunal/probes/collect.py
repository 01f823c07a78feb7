"""Find, check and tabulate direction files: ``tribunal collect [PATH ...] [--csv F] [--json F] [--pack F.zip]``.

A file is refused, by name and with its reason, when it is damaged, of an unknown version, a copy of another one, differs
from the hash in its receipt, or belongs to a run that has not finished. The older form has no receipt and is marked so.
"""

from __future__ import annotations

import csv as csv_module
import io
import json as json_module
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tribunal.core import plots, receipts, reports
from tribunal.core.errors import CorruptError, DataError, UserError
from tribunal.core.records import Report, ReportRow
from tribunal.core.stats import WITHIN_PROBLEM_PAIRS
from tribunal.core.storage import make_folder, read_json, sha256_file, write_atomic, write_file, write_json
from tribunal.probes.direction import FILE_NAME, Direction, Directions, is_direction_file, load

COLUMNS = (
    "experiment", "model", "dataset", "layer", "pooling", "kind", "n", "auroc", "auroc_low", "auroc_high", "gain", "gain_low", "gain_high",
    "gain_over", "best", "form", "file",
)  # fmt: skip
PICTURE = "directions_cosine.png"
FIGURES = {".png", ".svg", ".pdf"}
MOST_IN_PICTURE = 40
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Found:
    """One accepted file."""

    path: Path
    root: Path
    directions: Directions

    @property
    def experiment(self) -> str:
        return self.directions.experiment or self.path.stem


@dataclass
class Collection:
    """What was found.

    Attributes:
        rows: one dict per direction, keys ``COLUMNS``.
        refused: "path: reason" of every file that was not taken.
        written: files made.
    """

    found: list[Found] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The table of best directions, then what was refused and written."""
        lines = _table([row for row in self.rows if row["best"]])
        lines += [f"{len(self.rows)} directions in {len(self.found)} files; the table shows each file's best"] if self.rows else []
        lines += [f"refused: {reason}" for reason in self.refused]
        lines += [f"wrote {path}" for path in self.written]
        return "\n".join(lines or ["no direction files found"])


def collect(paths: Sequence[Path], *, csv: Path | None = None, json: Path | None = None, pack: Path | None = None) -> Collection:
    """Search, check, tabulate; optionally write the table, and pack JSONs and figures for download.

    The cosine-similarity picture is drawn beside the first file asked for (``directions_cosine.png``), and goes into the pack.

    Args:
        paths: folders to search (results/ by default, in the command), or single files.
    Raises:
        UserError: a path does not exist, or nothing was found.
        StorageError: a file asked for cannot be written.
    """
    collection = Collection()
    contents: dict[str, Path] = {}
    for root in paths:
        for path in _candidates(root):
            try:
                directions = _accept(path)
                if directions is None:
                    continue
                earlier = contents.setdefault(directions.content_sha256, path)
                if earlier.resolve() == path.resolve() and any(found.path.resolve() == path.resolve() for found in collection.found):
                    continue  # the same file under two of the given paths
                if earlier != path:
                    raise DataError(f"{path}: the same directions as {earlier}; remove one of the two")
                collection.found.append(Found(path, root, directions))
            except (DataError, CorruptError) as error:
                collection.refused.append(str(error))
    if not collection.found and not collection.refused:
        raise UserError(
            f"no direction files under {', '.join(map(str, paths))}; train_probes writes them ({FILE_NAME}), run `tribunal demo`"
        )
    collection.rows = [_row(found, direction) for found in collection.found for direction in found.directions.directions]
    _write(collection, csv, json, pack)
    return collection


def conclude(results: Path) -> str:
    """The end of a calibration, in words: a short table, the honest conclusion, and the files made.

    Args:
        results: results/<experiment>.
    """
    folder = results / "train_probes"
    report = reports.read_report(folder / reports.REPORT)
    headline = report.rows[0]
    counts = report.details["counts"]
    shown = sorted((c for c in headline.controls if c.name != "permuted_labels"), key=lambda control: -control.value)  # see pairs below
    lines = [
        "",
        f"{report.experiment}: {sum(counts.values())} traces ({', '.join(f'{count} {verdict}' for verdict, count in counts.items())}), "
        f"{report.details['n_problems']} problems",
        "",
        f"{'predicts a correct answer':<42}{'AUROC':>7}   95 % interval",
        _line(headline.name, headline.value, headline.low, headline.high),
    ]
    lines += [_line(f"  {control.name}", control.value, control.low, control.high) for control in shown]
    before = _deepest_prompt_end(report)
    for row in report.rows:
        if row.name == headline.name and row.stratum is not None:
            lines.append(_line(f"within {row.stratum}", row.value, row.low, row.high))
            lines += [_line(f"  {c.name}", c.value, c.low, c.high) for c in row.controls if c.name in ("length", "bag_of_words", "logprob")]
            lines += [_line(f"  {p.name}", p.value, p.low, p.high) for p in before if p.stratum == row.stratum]
    lines += ["", f"{'right above wrong, within a problem':<42}{'share':>7}   95 % interval"]
    for row in report.rows:
        if row.metric == WITHIN_PROBLEM_PAIRS and row.name == headline.name:
            lines.append(_line(row.name, row.value, row.low, row.high))
            lines += [_line(f"  {c.name}", c.value, c.low, c.high) for c in row.controls if c.name in ("logprob", "permuted_labels")]
    lines += ["", report.verdict, "", "Not shown by this:"]
    lines += [f"- {sentence}" for sentence in report.not_supported]
    lines += ["", "Files:"]
    lines += [f"- {path}" for path in (folder / FILE_NAME, *(folder / name for name in report.figures), folder / reports.REPORT)]
    return "\n".join(lines)


def _deepest_prompt_end(report: Report) -> list[ReportRow]:
    """AUROC within each stratum of the probe on the prompt's last token: what is known before anything is generated."""
    rows = [r for r in report.rows if r.metric == "auroc" and r.name.endswith(", prompt_end") and r.stratum is not None]
    return [row for row in rows if row.name == rows[-1].name]


def _line(name: str, value: float, low: float, high: float) -> str:
    return f"{name:<42}{value:>7.3f}   [{low:.3f}, {high:.3f}]"


def _candidates(root: Path) -> Iterator[Path]:
    """Files to look at: a file that was named, or every JSON below a folder (staging folders left out)."""
    if root.is_file():
        yield root
    elif root.is_dir():
        for path in sorted(root.rglob("*.json")):
            if path.name != receipts.RECEIPT and not any(part.startswith(".") for part in path.relative_to(root).parts):
                yield path
    else:
        raise UserError(f"{root}: no such file or folder; give a results folder or a direction JSON")


def _accept(path: Path) -> Directions | None:
    """A checked file, or None when it holds something else.

    Raises:
        DataError, CorruptError: it is a direction file and must be refused; names the path and the reason.
    """
    if path.name != FILE_NAME:
        try:
            data = read_json(path)
        except CorruptError:
            if path.stem.endswith("directions"):
                raise
            return None  # some other program's file
        if not is_direction_file(data):
            return None
    receipt = receipts.read_receipt(path.parent)
    if receipt is None:
        directions = load(path)
        if directions.form == "current":
            raise DataError(f"{path}: partial run: no {receipts.RECEIPT} beside it, so the job that writes it has not finished")
        return directions
    listed = receipt.get("outputs", {}).get(path.name)
    if listed is None:
        raise DataError(f"{path}: not among the outputs of the {receipts.RECEIPT} beside it")
    expected = listed["sha256"] if isinstance(listed, dict) else listed
    if sha256_file(path) != expected:
        raise CorruptError(f"{path}: does not match the hash in its {receipts.RECEIPT}; it was changed after the run")
    return load(path)


def _row(found: Found, direction: Direction) -> dict[str, Any]:
    directions = found.directions
    auroc = direction.metrics.get("auroc") or {}
    gain = direction.metrics.get("gain") or {}
    return {
        "experiment": found.experiment,
        "model": directions.model.name,
        "dataset": directions.dataset.get("name"),
        "layer": direction.layer,
        "pooling": direction.pooling,
        "kind": direction.kind,
        "n": direction.metrics.get("n"),
        "auroc": auroc.get("value"),
        "auroc_low": auroc.get("low"),
        "auroc_high": auroc.get("high"),
        "gain": gain.get("value"),
        "gain_low": gain.get("low"),
        "gain_high": gain.get("high"),
        "gain_over": gain.get("over"),
        "best": direction == directions.select(),
        "form": directions.form,
        "file": found.path.as_posix(),
    }


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    head = ("experiment", "model", "dataset", "layer", "pooling", "n", "AUROC [95 %]", "gain over the best control", "")
    cells = [head]
    for row in rows:
        cells.append(
            (
                row["experiment"],
                row["model"] or "?",
                row["dataset"] or "?",
                str(row["layer"]),
                row["pooling"],
                str(row["n"] or "?"),
                _number(row, "auroc", "{:.3f}"),
                f"{_number(row, 'gain', '{:+.3f}')} ({row['gain_over']})" if row["gain_over"] else "?",
                "older form" if row["form"] == "older" else "",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells]


def _number(row: dict[str, Any], name: str, form: str) -> str:
    if row[name] is None:
        return "?"
    return f"{form.format(row[name])} [{form.format(row[f'{name}_low'])}, {form.format(row[f'{name}_high'])}]"


def _write(collection: Collection, csv: Path | None, json: Path | None, pack: Path | None) -> None:
    asked = [path for path in (csv, json, pack) if path is not None]
    for path in asked:
        make_folder(path.absolute().parent)
    if csv is not None:
        text = io.StringIO()
        writer = csv_module.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(collection.rows)
        write_atomic(csv, text.getvalue())
    if json is not None:
        write_json(json, {"rows": collection.rows, "refused": collection.refused})
    picture = asked[0].absolute().parent / PICTURE if asked and collection.found else None
    if picture is not None:
        write_file(picture, lambda temporary: cosine_picture(collection.found, temporary))
    if pack is not None:
        write_file(pack, lambda temporary: _pack(collection, picture, temporary))
    collection.written = [*asked, *([picture] if picture else [])]


def cosine_picture(found: Sequence[Found], path: Path) -> None:
    """Cosine similarity of each file's directions of its leading kind, one panel per model and width."""
    groups: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
    several = len(found) > 1
    for item in found:
        leading = item.directions.select().kind
        for direction in item.directions.directions:
            if direction.kind == leading:
                name = f"{item.experiment} · " if several else ""
                key = item.directions.model.name or "unknown model", item.directions.model.d_model
                groups.setdefault(key, []).append(
                    (f"{name}{direction.layer} {direction.pooling}", np.asarray(direction.vector) / direction.norm)
                )
    sides = [2.5 + 0.24 * min(len(members), MOST_IN_PICTURE) for members in groups.values()]
    figure, axes = plots.figure(len(groups), 1, width=max(sides) + 1.5, height=sum(sides))
    for axis, ((model, width), members) in zip(axes[:, 0], groups.items()):
        shown = members[:MOST_IN_PICTURE]
        names, vectors = [name for name, _ in shown], np.stack([vector for _, vector in shown])
        image = axis.imshow(vectors @ vectors.T, vmin=-1, vmax=1, cmap="PuOr")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.grid(visible=False)
        left_out = f", first {MOST_IN_PICTURE} of {len(members)}" if len(members) > MOST_IN_PICTURE else ""
        axis.set_title(f"Cosine similarity of directions\n{model}, d = {width}{left_out}", loc="left")
        figure.colorbar(image, ax=axis, shrink=0.7)
    plots.save(figure, path)


def _pack(collection: Collection, picture: Path | None, target: Path) -> None:
    """All JSONs and figures of the runs found, in their folders; the same bytes for the same files."""
    files: dict[str, Path] = {}
    roots = {(found.root if found.root.is_dir() else found.root.parent).resolve() for found in collection.found}
    base = Path(os.path.commonpath(sorted(roots))) if roots else Path()
    for found in collection.found:
        place = found.path.resolve().relative_to(base)
        files.setdefault(place.as_posix(), found.path)
        if receipts.read_receipt(found.path.parent) is not None:
            for path in sorted(found.path.parent.iterdir()):
                if path.is_file() and path.suffix in {".json", *FIGURES}:
                    files.setdefault((place.parent / path.name).as_posix(), path)
    if picture is not None:
        files.setdefault(PICTURE, picture)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        table = json_module.dumps({"rows": collection.rows}, indent=2, sort_keys=True)
        archive.writestr(zipfile.ZipInfo("directions.json", ZIP_DATE), table, zipfile.ZIP_DEFLATED)
        for name, path in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), path.read_bytes(), zipfile.ZIP_DEFLATED)
