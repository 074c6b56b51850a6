"""Figures of an evaluation and of a search. They need matplotlib, as those in ``plots.py`` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steered_moe.controls import OF
from steered_moe.errors import SteeredMoEError
from steered_moe.figure import COLOURS, figure
from steered_moe.summary import Line
from steered_moe.tasks import TASKS

_ROW = 0.32  # inches
_LEAST = 0.5  # points
_MARKS = "os^Dv<>P"
_UNITS = {"bits_per_byte": "thousandths of a bit per byte"}


def plot_gains(lines: Sequence[Line], path: str | Path) -> None:
    """Gain of each steering by language with its interval, and of its controls as grey marks.

    Args:
        lines: From `summarise`; each task has a column.
        path: Where to write; its ending says the format.

    Raises:
        SteeredMoEError: There are no lines, or matplotlib is not installed.
    """
    if not lines:
        raise SteeredMoEError("there are no gains to plot; give the lines of a finished run")
    tasks = list(dict.fromkeys(line.task for line in lines))
    languages = list(dict.fromkeys(line.language for line in lines))
    columns = tuple(1 for _ in tasks)
    with figure(path, columns, height=1.2 + _ROW * len(languages)) as (drawn, found):
        panels = [found] if len(tasks) == 1 else list(found)
        for axes, task in zip(panels, tasks, strict=True):
            _gains(axes, [line for line in lines if line.task == task], languages)
            axes.set(title=task, xlabel=f"gain, {_UNITS.get(TASKS[task].metric, 'points')}")
            axes.label_outer()
        names = panels[0].get_legend_handles_labels()
        drawn.legend(*names, loc="outside upper center", ncols=4, frameon=False)


def _edge(lines: Sequence[Line]) -> float:
    """How far the axis reaches: beyond all intervals of steerings, not to every control."""
    own = [line.gain for line in lines if OF not in line.system] or [line.gain for line in lines]
    return 1.6 * max(max(-gain.low, gain.high, _LEAST) for gain in own)


def _control(axes: Any, mean: float, place: float, edge: float) -> None:
    """A mark; a number at the edge where the mark would lie beyond it."""
    if abs(mean) <= edge:
        axes.plot(mean, place, "|", color="0.6")
        return
    side = -1 if mean < 0 else 1
    where = {"ha": "left" if mean < 0 else "right", "va": "center"}
    axes.text(side * 0.99 * edge, place, f"{mean:+.1f}", color="0.5", fontsize=6, **where)


def _style(number: int) -> tuple[str, str]:
    """Mark and colour of a steering: the marks change where the colours begin again."""
    again, colour = divmod(number, len(COLOURS))
    return _MARKS[again % len(_MARKS)], COLOURS[colour]


def _gains(axes: Any, lines: Sequence[Line], languages: Sequence[str]) -> None:
    names = list(dict.fromkeys(line.system.partition(OF)[0] for line in lines))
    edge = _edge(lines)
    for line in lines:
        name, _, control = line.system.partition(OF)
        place = languages.index(line.language) + (names.index(name) + 1) / (len(names) + 1) - 0.5
        if control:
            _control(axes, line.gain.mean, place, edge)
            continue
        low, high = line.gain.mean - line.gain.low, line.gain.high - line.gain.mean
        mark, colour = _style(names.index(name))
        axes.errorbar(line.gain.mean, place, xerr=[[low], [high]], fmt=mark, ms=4, color=colour)
    for number, name in enumerate(names):
        mark, colour = _style(number)
        axes.plot([], [], mark, color=colour, label=name)
    if any(OF in line.system for line in lines):
        axes.plot([], [], "|", color="0.6", label="controls")
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_xlim(-edge, edge)
    axes.set(yticks=range(len(languages)), yticklabels=languages, ylim=(len(languages) - 0.5, -0.5))


def plot_pareto(points: Sequence[tuple[float, float, bool]], path: str | Path) -> None:
    """Gain in other languages against what English gains or loses, of the settings of a search.

    Args:
        points: Mean gain over the languages, gain of English, both in points, and whether no other
            setting is better in both.
        path: Where to write.
    """
    with figure(path) as (_, axes):
        for best, colour, name in ((False, "0.6", "tried"), (True, COLOURS[1], "Pareto front")):
            chosen = sorted((english, gain) for gain, english, front in points if front == best)
            axes.plot([x for x, _ in chosen], [y for _, y in chosen], "o-" if best else "o",
                      color=colour, label=name)  # fmt: skip
        axes.axhline(0, color="0.8", zorder=0)
        axes.axvline(0, color="0.8", zorder=0)
        axes.set(xlabel="gain of English, points", ylabel="mean gain of the languages, points")
        axes.legend(frameon=False)
