"""The look that all figures share: colours that colour-blind readers can tell apart, no clutter, the same bytes each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#B8A900"
GREY, DARK, FAINT = "#7F7F7F", "#222222", "#E4E4E4"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, DARK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Okabe and Ito's palette, and a marker with each colour: series differ in print, too."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "text.color": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


def figure(rows: int, columns: int, *, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of our style and its axes (array [rows, columns]); drawn without a display. Sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(STYLE)
    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def series(number: int) -> dict[str, Any]:
    """Colour and marker of the n-th series."""
    return {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}


def tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def save(fig: Figure, path: Path) -> None:
    """Write a PNG without dates or version, and free the figure."""
    from matplotlib import pyplot

    fig.savefig(path, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(fig)
