"""The page of an analysis: one HTML file that shows its figures and numbers, without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; height: auto; background: white }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }
td, th { padding: .15rem .5rem; border-bottom: 1px solid #ccc; text-align: right }
td:first-child, th:first-child { text-align: left }
.wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Figure:
    """A figure on the page: its file, beside the page, and what it shows."""

    file: str
    caption: str


def write_page(
    path: Path, numbers: Mapping[str, Any], figures: Sequence[Figure], labels: Mapping[str, str]
) -> None:
    """Write the page of an analysis.

    Args:
        path: The HTML file; figures lie beside it.
        numbers: From `analyze_profile`.
        figures: In the order to show them.
        labels: Language -> name to show.
    """
    names = {code: labels.get(code, code) for code in numbers["languages"]}
    body = [
        f"<h1>Routing of {escape(str(numbers['about'].get('model', 'a model')))}</h1>",
        _facts(numbers),
        *(_figure(figure) for figure in figures),
        *_tables(numbers, names),
        '<p>All numbers are in <a href="analysis.json">analysis.json</a>.</p>',
    ]
    head = f'<meta charset="utf-8"><title>Routing analysis</title><style>{_STYLE}</style>'
    html = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
    path.write_text(html + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")


def _facts(numbers: Mapping[str, Any]) -> str:
    used, proposed = numbers["middle_layers"]["used"], numbers["middle_layers"]["proposed"]
    facts = {
        **{key: value for key, value in numbers["about"].items() if value is not None},
        "compared with": numbers["pivot"],
        "middle layers": f"{used[0]}-{used[1]}",
        "proposed from the curve": proposed,
        "profile": numbers["profile_sha256"],
    }
    return _table(("", ""), [(key, str(value)) for key, value in facts.items()])


def _figure(figure: Figure) -> str:
    caption = escape(figure.caption)
    picture = f'<img src="{escape(figure.file)}" alt="{caption}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _tables(numbers: Mapping[str, Any], names: Mapping[str, str]) -> Iterable[str]:
    layers = [str(layer) for layer in numbers["layers"]]
    near = numbers["nearest_language"]
    rows = [
        (names[code], f"{value:.3f}", names[near[code]], f"{int(numbers['tokens'][code])}")
        for code, value in numbers["divergence_in_the_middle"].items()
    ]
    yield "<h2>Languages</h2>"
    yield _table(("language", "divergence in the middle", "routes most like", "tokens"), rows)
    for key in ("divergence", "entropy", "consistency"):
        if key in numbers:
            curves = [
                (names[code], *(f"{x:.3f}" for x in curve)) for code, curve in numbers[key].items()
            ]
            yield f"<h2>{key.capitalize()} by layer</h2>"
            yield _table(("layer", *layers), curves)
    own = [(names[code], *map(str, row)) for code, row in numbers["exclusive_experts"].items()]
    yield "<h2>Experts shared by languages, and exclusive to one, by layer</h2>"
    yield _table(("layer", *layers), [("shared", *map(str, numbers["shared_experts"])), *own])
    if "correlation" in numbers:
        yield from _correlation(numbers["correlation"], layers)


def _correlation(found: Mapping[str, Any], layers: Sequence[str]) -> Iterable[str]:
    title = f"Correlation of divergence with {found['score']}, {found['languages']} languages"
    rows = [
        (f"{kind}, {part}", *map(_signed, found[kind][part]))
        for kind in ("pearson", "spearman")
        for part in ("value", "low", "high")
    ]
    yield f"<h2>{escape(title)}</h2>"
    sides = {
        "Languages": found["used"],
        "profiled, but without a score": found["without_score"],
        "with a score, but not profiled": found["not_profiled"],
    }
    said = "; ".join(f"{what}: {', '.join(codes)}" for what, codes in sides.items() if codes)
    yield f"<p>{escape(said)}. low and high: 95 % interval; – where there is none.</p>"
    yield _table(("layer", *layers), rows)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'
