"""The paper's figures share this: files, fonts, colours. Needs matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steered_moe.errors import SteeredMoEError

# Colours that colour-blind readers tell apart (Okabe and Ito), and dashes for when they run out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
EVEN = "cividis"  # even in lightness, for colour-blind readers too
SIGNED = "PuOr_r"

Labels = Mapping[str, str]


class figure:  # noqa: N801, a context manager that reads like a function
    """A figure and its axes; written to ``path`` at the end."""

    def __init__(self, path: str | Path, columns: tuple[int, ...] = (), height: float = 4) -> None:
        self.path, self.columns, self.height = Path(path), columns, height

    def __enter__(self) -> tuple[Any, Any]:
        check_matplotlib()
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(7, self.height), layout="constrained")
        if not self.columns:
            return self.figure, self.figure.subplots()
        return self.figure, self.figure.subplots(
            1, len(self.columns), gridspec_kw={"width_ratios": self.columns}
        )

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            return
        from matplotlib import rc_context

        # No date and no random ids in the file, so that the same figure is the same bytes.
        metadata = {"Date": None} if self.path.suffix == ".svg" else None
        settings = {"svg.fonttype": "none", "svg.hashsalt": "steered-moe"}
        with rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts
            self.figure.savefig(self.path, dpi=120, metadata=metadata)


def check_matplotlib() -> None:
    """Refuse to go on where no figure could be drawn at the end.

    Raises:
        SteeredMoEError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise SteeredMoEError('figures need matplotlib: pip install "steered-moe[plots]"')


def shown(languages: Mapping[str, Any], labels: Labels | None, path: str | Path) -> Labels:
    """Language -> what to write; its code where a raster figure has no font for the label."""
    names = {language: (labels or {}).get(language, language) for language in languages}
    wanted = {language: name.replace("$", r"\$") for language, name in names.items()}
    if Path(path).suffix == ".svg":
        return wanted
    return {code: name if _drawable(name) else code for code, name in wanted.items()}


def _drawable(text: str) -> bool:
    """Whether matplotlib's font has every character; it does not join those of Indic scripts."""
    try:
        from matplotlib.font_manager import FontProperties, findfont, get_font
    except ImportError:
        return True
    characters = get_font(findfont(FontProperties())).get_charmap()
    return all(ord(character) in characters for character in text)
