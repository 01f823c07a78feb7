"""``report.json`` and ``steering.png`` of the job ``steer``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tribunal.core import plots, reports
from tribunal.core.records import Report, ReportRow, Verdict
from tribunal.core.reports import write_report
from tribunal.core.stats import Estimate
from tribunal.core.storage import write_jsonl
from tribunal.core.work import Journal, Json
from tribunal.probes.steering import Condition, ProbeDirections, SteeringRun
from tribunal.probes.steering_effects import ALPHA, METRIC, POWER, RIGHT, WRONG, Cell, Effect, Effects, holm, quality, smallest_effect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = "steering.png"
ATTEMPTS = "steering.jsonl"
EFFECT = "an effect beyond random directions"
FROM = {"prompt": "from the prompt", "middle": "from the middle"}


def publish(run: SteeringRun, journal: Journal, out: Path, *, experiment: str) -> None:
    """Write steering.jsonl, the figure and the report into ``out``.

    Args:
        journal: the attempts' records by key; those that were set aside are missing.
    """
    attempts = [attempt for attempt in run.attempts if attempt.key in journal]
    records = {attempt.key: journal[attempt.key] for attempt in attempts}
    write_jsonl(out / ATTEMPTS, records.values())
    effects = Effects(run.attempts, records, layer=run.layer, resamples=run.settings["bootstrap"], seed=run.seed)
    lengths = {r["layer"]: r["added_norm"] / abs(r["strength"]) for r in records.values() if r["strength"]}
    place = run.directions.place
    details = {
        "direction": {"layer": place.layer, "pooling": place.pooling, "kind": place.kind, "held_out": run.directions.held_out},
        "unit_of_strength": "mean length of the residual stream after that block, over the readable tokens of right traces",
        "mean_residual_length": {str(layer): length for layer, length in sorted(lengths.items())},
        "adaptive_percentile": run.settings["adaptive_percentile"],
        "traces": {METRIC[verdict]: effects.n(verdict) for verdict in (WRONG, RIGHT)},
        "draws": run.settings["draws"],
        "sampling": {name: run.settings[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
        "continued": sum(record["continued"] for record in records.values()),
        "set_aside": len(run.attempts) - len(attempts),
    }
    n_layers = run.directions.model.n_layers
    write_report(out, make_report(effects, run.directions, out, experiment=experiment, n_layers=n_layers, details=details))


class Question(NamedTuple):
    """One of the few comparisons that the verdict rests on: fixed before the data, all counted by Holm's correction."""

    what: str
    cell: Cell
    verdict: Verdict
    sign: int  # +1: more right answers are expected, -1: fewer
    effect: Effect


def name_of(condition: Condition) -> str:
    """How a condition is called in the report."""
    what = {"add": f"probe {condition.strength:+g}", "adaptive": f"adaptive {condition.strength:+g}", "project_out": "projected out"}
    return f"{what[condition.action]}, layer {condition.layer}, {FROM[condition.start]}"


def questions(effects: Effects, layers: Sequence[int]) -> list[Question]:
    """Towards and away from correct at each layer, then the direction taken out, then the adaptive push."""
    found: list[tuple[str, Cell | None, Verdict, int]] = []
    for layer in layers:
        found.append((f"Pushing towards correct after block {layer}", effects.pooled(layer, 1), WRONG, 1))
        found.append((f"Pushing away from it after block {layer}", effects.pooled(layer, -1), RIGHT, -1))
    for action, what, verdict, sign in (
        ("project_out", "Projecting the direction out", RIGHT, -1),
        ("adaptive", "Pushing only where the signal is low", WRONG, 1),
    ):
        ours = tuple(cell.first for cell in effects.cells if cell.first.action == action)
        found.append((what, Cell(ours) if ours else None, verdict, sign))
    return [Question(what, cell, verdict, sign, effects.effect(cell, verdict)) for what, cell, verdict, sign in found if cell is not None]


def finding(asked: Question, adjusted_p: float) -> str:
    """What one comparison found, in words; "no better than random" is an answer."""
    effect = asked.effect
    rank = effect.rank_above if asked.sign > 0 else effect.rank_below
    moved = effect.over_none.value * asked.sign
    beats_random = rank <= ALPHA
    if adjusted_p <= ALPHA and moved > 0:
        return EFFECT if beats_random else "no more than random directions do"
    if adjusted_p <= ALPHA and asked.sign > 0:
        return "harm, though less than random directions do" if beats_random else "harm, as random directions do"
    if adjusted_p <= ALPHA:
        return "more right answers instead of fewer"
    if beats_random and asked.sign > 0:
        return "no better than no steering, where random directions do harm"
    if beats_random:
        return "worse than random directions, but not clearly worse than no steering"
    return "no better than random" if asked.sign > 0 else "no worse than random"


def sentence(asked: Question, adjusted_p: float) -> str:
    """A comparison with its numbers."""
    effect = asked.effect
    rank = effect.rank_above if asked.sign > 0 else effect.rank_below
    values = [estimate.value for estimate in effect.each_random]
    low, high = effect.value.interval
    return (
        f"{asked.what}, {effect.value.value:.0%} [{low:.0%}, {high:.0%}] of {'wrong' if asked.verdict == WRONG else 'right'} traces are "
        f"right, {effect.none.value:.0%} without steering, {effect.randoms.value:.0%} along {len(values)} random directions "
        f"({min(values):.0%} to {max(values):.0%}): {finding(asked, adjusted_p)} (exact p {adjusted_p:.2g}, rank p {rank:.2g})."
    )


def make_report(
    effects: Effects, directions: ProbeDirections, out: Path, *, experiment: str, n_layers: int | None, details: Json
) -> Report:
    """Draw the figure into ``out`` and put the report together."""
    upstream = sorted({c.layer for c in effects.conditions} - {effects.layer})
    chosen = questions(effects, [effects.layer, *upstream])
    adjusted = holm([asked.effect.exact_p for asked in chosen])
    broken = [cell.first for cell in effects.cells if effects.only_breaks_text(cell)]
    rows = [_row(f"{asked.what[0].lower()}{asked.what[1:]}, pooled", asked.effect, asked.verdict, effects) for asked in chosen]
    table: list[Json] = []
    for cell in effects.cells:
        for verdict in (WRONG, RIGHT):
            effect = effects.effect(cell, verdict)
            rows.append(_row(name_of(cell.first), effect, verdict, effects))
            table.append(_entry(effects, cell, verdict, effect, cell.first in broken))
    power = _power(effects)
    figure(
        effects,
        out / FIGURE,
        title=f"{experiment}: does steering along the probe change answers?" + ("  (planted signal)" if directions.planted else ""),
    )
    return Report(
        job="steer",
        experiment=experiment,
        verdict=_verdict(chosen, adjusted, broken, power, directions.planted),
        not_supported=_not_supported(effects, directions, n_layers, upstream),
        figures=[FIGURE],
        rows=rows,
        details={
            **details,
            "tests": [_tested(asked, p) for asked, p in zip(chosen, adjusted, strict=True)],
            "conditions": table,
            "without_steering": _baseline(effects),
            "breaks_text": [c.key for c in broken],
            "left_out": [c.key for c in effects.left_out],
            "power": power,
        },
    )


def _tested(asked: Question, adjusted_p: float) -> Json:
    effect = asked.effect
    return {
        "what": asked.what,
        "metric": METRIC[asked.verdict],
        "conditions": [condition.key for condition in asked.cell.conditions],
        "found": finding(asked, adjusted_p),
        "sentence": sentence(asked, adjusted_p),
        "over_no_steering": [effect.over_none.value, *effect.over_none.interval],
        "over_random": [effect.over_random.value, *effect.over_random.interval],
        "exact_p": effect.exact_p,
        "exact_p_holm": adjusted_p,
        "problems_helped": effect.helped,
        "problems_harmed": effect.harmed,
        "rank_p_above": effect.rank_above,
        "rank_p_below": effect.rank_below,
    }


def _baseline(effects: Effects) -> list[Json]:
    starts = [condition for condition in effects.conditions if condition.action == "none"]
    return [{"start": c.start, "class": METRIC[verdict], **quality(effects, c, verdict)} for c in starts for verdict in (WRONG, RIGHT)]


def _row(name: str, effect: Effect, verdict: Verdict, effects: Effects) -> ReportRow:
    controls = {"no_steering": effect.none, "random_directions": effect.randoms}
    if effect.contrast is not None:
        controls["diff_of_means"] = effect.contrast
    return reports.row(name, METRIC[verdict], effect.value, effects.n(verdict), controls=controls, rivals=("random_directions",))


def _entry(effects: Effects, cell: Cell, verdict: Verdict, effect: Effect, broken: bool) -> Json:
    """One line of the report's table of conditions."""
    each = sorted([e.value, *e.interval] for e in effect.each_random)
    return {
        "condition": cell.first.key,
        "class": METRIC[verdict],
        "right": [effect.value.value, *effect.value.interval],
        "over_no_steering": [effect.over_none.value, *effect.over_none.interval],
        "over_random": [effect.over_random.value, *effect.over_random.interval],
        "exact_p": effect.exact_p,
        "problems_helped": effect.helped,
        "problems_harmed": effect.harmed,
        "rank_p_above": effect.rank_above,
        "rank_p_below": effect.rank_below,
        "random_directions": each,
        "only_breaks_text": broken,
        **quality(effects, cell.first, verdict),
    }


def _power(effects: Effects) -> list[Json]:
    """For the least strength at each start and layer: what a single condition of this size could have shown."""
    found = []
    least = {(c.first.start, c.first.layer): c for c in reversed(effects.cells) if c.first.action == "add" and c.first.strength > 0}
    for (start, layer), cell in sorted(least.items()):
        for verdict in (WRONG, RIGHT):
            share = effects.discordant(cell, verdict)
            smallest = smallest_effect(effects.n(verdict), share)
            place = {"start": start, "layer": layer, "strength": cell.first.strength, "class": METRIC[verdict]}
            found.append(
                {**place, "n": effects.n(verdict), "discordant": share, "smallest_effect": smallest, "power": POWER, "alpha": ALPHA}
            )
    return found


def _verdict(
    chosen: Sequence[Question], adjusted: Sequence[float], broken: Sequence[Condition], power: Sequence[Json], planted: bool
) -> str:
    """The answer in words, with the numbers of what was found; of the first comparison, where nothing was."""
    pairs = list(zip(chosen, adjusted, strict=True))
    effects = sum(finding(asked, p) == EFFECT for asked, p in pairs)
    if effects:
        says = [f"In {effects} of {len(pairs)} comparisons steering along the probe does more than random directions of equal length."]
    else:
        says = [
            f"No better than random: in none of {len(pairs)} comparisons does steering along the probe beat both no steering and random "
            "directions of equal length."
        ]
    says += [sentence(asked, p) for asked, p in pairs if p <= ALPHA] or [sentence(*pairs[0])]
    if broken:
        strengths = sorted({condition.strength for condition in broken})
        says.append(f"Strength {', '.join(f'{strength:+g}' for strength in strengths)} only breaks the text.")
    seen = [entry["smallest_effect"] for entry in power]
    if seen and None not in seen:
        says.append(f"The smallest change that one condition could have shown here is {min(seen) * 100:.0f} points (80 % power).")
    elif seen:
        says.append("There are too few traces for one condition alone to show any change.")
    if planted:
        says.append("The signal is planted by this model's training (a positive control for the pipeline).")
    return " ".join(says)


def _not_supported(effects: Effects, directions: ProbeDirections, n_layers: int | None, upstream: Sequence[int]) -> list[str]:
    place, count = directions.place, len(effects.numbers)
    says = [
        f"A rank p below {1 / (count + 1):.3f}: there are {count} random directions. They are drawn from all directions alike, not "
        "from those that the model's states vary along.",
        "That the model does not use what the probe reads, where steering does nothing: adding one vector at one layer is one "
        "intervention of many.",
    ]
    if directions.held_out:
        says.append(
            "A choice of layer and pooling that is free of the steered problems: they were chosen on all; each vector was fitted "
            "without the problems that it steers."
        )
    else:
        says.append(
            f"A direction that never saw the traces that it steers: for {place.pooling}, {place.kind} at layer {place.layer} only the "
            "fit on all of them is kept."
        )
    if n_layers is not None and effects.layer == n_layers - 1:
        says.append(
            f"An effect of block {effects.layer} on later states: it is the last one, so a change there moves the next token's logits "
            "and nothing else."
        )
    if upstream:
        says.append(f"A direction of layer {', '.join(map(str, upstream))} itself: upstream, the one of layer {effects.layer} is added.")
    if effects.left_out:
        says.append(f"Anything under {len(effects.left_out)} conditions: completions under them ended the process and were set aside.")
    if directions.planted:
        says.append("Anything about reasoning models: the built-in model was trained to notice its slips, so the signal is planted.")
    return says


def figure(effects: Effects, path: Path, *, title: str) -> None:
    """A row for each start and layer: share right by strength for wrong and for right traces, and attempts without an answer."""
    places = list(dict.fromkeys((c.first.start, c.first.layer) for c in effects.cells if c.first.action == "add"))
    fig, axes = plots.figure(len(places), 3, width=14, height=0.6 + 3.4 * len(places))
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for line, (start, layer) in enumerate(places):
        where = f"{FROM[start]}, layer {layer}"
        _dose(axes[line, 0], effects, start, layer, WRONG, "right", f"Wrong traces made right: {where}", "share right")
        _dose(axes[line, 1], effects, start, layer, RIGHT, "right", f"Right traces kept right: {where}", "share right")
        _dose(axes[line, 2], effects, start, layer, None, "broken", "No answer: unparsable or cut off", "share of attempts")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    plots.save(fig, path)


def _dose(axes: Axes, effects: Effects, start: str, layer: int, verdict: Verdict | None, field: str, title: str, label: str) -> None:
    """One curve over signed strengths beside the band of random directions; other actions to its right."""
    ours = [cell for cell in effects.cells if (cell.first.start, cell.first.layer) == (start, layer)]
    pushes = sorted((cell for cell in ours if cell.first.action == "add"), key=lambda cell: cell.first.strength)
    others = [cell for cell in ours if cell.first.action != "add"]
    strengths = sorted({cell.first.strength for cell in pushes} | {0.0})
    middle = strengths.index(0.0)
    none = Cell(pushes[0].without(effects.layer))

    def measure(conditions: Sequence[Condition]) -> Estimate:
        return effects.over_both(conditions, field) if verdict is None else effects.over(conditions, verdict, field)

    def draw(x: float, cell: Cell) -> tuple[float, float, float]:
        each = [measure(conditions).value for conditions in effects.randoms(cell)]
        return min(each), float(np.mean(each)), max(each)

    base = measure(none.conditions)
    axes.axhline(base.value, color=plots.DARK, linewidth=1, linestyle="--", zorder=1, label="no steering")
    lines: list[tuple[str, str, dict[float, Estimate]]] = [("probe", plots.BLUE, {}), ("difference of means", plots.GREEN, {})]
    for cell in pushes:
        lines[0][2][strengths.index(cell.first.strength)] = measure(cell.conditions)
        if effects.has(contrast := cell.of("diff_of_means")):
            lines[1][2][strengths.index(cell.first.strength)] = measure(contrast)
    band = {strengths.index(cell.first.strength): draw(0, cell) for cell in pushes} | {middle: (base.value,) * 3}
    xs = sorted(band)
    axes.fill_between(
        xs, [band[x][0] for x in xs], [band[x][2] for x in xs], color=plots.GREY, alpha=0.25, linewidth=0, label="random directions, range"
    )
    axes.plot(xs, [band[x][1] for x in xs], color=plots.GREY, label="random directions, mean")
    for number, (name, colour, points) in enumerate(lines):
        if points:
            points[middle] = base
            _points(axes, points, shift=0.06 * (2 * number - 1), color=colour, marker=plots.MARKERS[number], label=name)
    for place, cell in enumerate(others, len(strengths)):
        low, mean, high = draw(place, cell)
        axes.bar(place, high - low, 0.5, bottom=low, color=plots.GREY, alpha=0.25, linewidth=0)
        axes.plot([place - 0.25, place + 0.25], [mean, mean], color=plots.GREY)
        _points(axes, {place: measure(cell.conditions)}, shift=0.0, color=plots.BLUE, marker=plots.MARKERS[0])
    words = ["out" if cell.first.action == "project_out" else f"adaptive\n{cell.first.strength:+g}" for cell in others]
    axes.set_xticks(range(len(strengths) + len(others)), [*(f"{s:+g}" if s else "0" for s in strengths), *words])
    axes.set_ylim(-0.03, 1.03)
    plots.tidy(axes, title, "added, in mean residual lengths; + is towards correct", label)


def _points(axes: Axes, points: dict[float, Estimate], *, shift: float, **style: object) -> None:
    xs = sorted(points)
    values = np.array([points[x].value for x in xs])
    bounds = np.array([points[x].interval for x in xs]).T
    axes.errorbar([x + shift for x in xs], values, yerr=np.abs(bounds - values), capsize=2, elinewidth=1, **style)  # type: ignore[arg-type]
