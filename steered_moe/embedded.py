"""Where the embedded model is: the small trained MoE of a checkout."""

from __future__ import annotations

from pathlib import Path

from steered_moe.errors import SteeredMoEError

EMBEDDED = "embedded"
"""What the command line takes instead of a folder or Hub id."""

FOLDER = Path(__file__).parent.parent / "examples" / "tiny_multilingual_moe"


def embedded_model() -> Path:
    """The steering repo of the embedded model; its base lies beside it.

    Raises:
        SteeredMoEError: The package was installed without the examples.
    """
    folder = FOLDER / "steered"
    if not folder.is_dir():
        raise SteeredMoEError(
            "an installed wheel has no embedded model: name a steering repo (a folder or a Hub "
            "id), or run from a checkout of steered-moe"
        )
    return folder


def named_repo(name: str) -> str:
    """A steering repo as the command line names it; `EMBEDDED` becomes its folder."""
    return str(embedded_model()) if name == EMBEDDED else name


def named_model(name: str) -> str:
    """A base model as the command line names it; `EMBEDDED` becomes its folder."""
    return str(embedded_model().parent / "base") if name == EMBEDDED else name
