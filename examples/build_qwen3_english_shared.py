"""Rebuild ``examples/qwen3-30b-a3b-english-shared`` from measured routing, byte for byte.

    python examples/build_qwen3_english_shared.py RECORDINGS [FOLDER]

RECORDINGS holds ``mgsm_<language>.json``: what the routing recorder of arXiv 2601.14050 measured
on Qwen3-30B-A3B over the 250 MGSM questions, as its authors published it (MIT). Selection and
strength are their released settings with English as the source of coefficients.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.cards import write_card
from steered_moe.selection import shared_experts
from steered_moe.storage import SteeringRepo

FOLDER = Path(__file__).parent / "qwen3-30b-a3b-english-shared"
STRENGTH = 0.022
BASE = {
    "base_model_name_or_path": "Qwen/Qwen3-30B-A3B",
    "base_model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def build_steering(recordings: Path) -> RouterSteering:
    """Experts shared by English and Chinese in layers 10 to 39, weighted by English's share."""
    about = {"corpus": "MGSM questions, 250 per language (CC BY 4.0)"}
    profile = replace(RoutingProfile.from_recorder(recordings), about=about)
    return shared_experts(
        profile,
        ("en", "zh"),
        top=20,
        threshold=0.7,
        layers=range(10, 40),
        name="english-shared",
    )


def main(recordings: Path, folder: Path = FOLDER) -> None:
    """Write config, tensors and card."""
    repo = SteeringRepo(BASE, [build_steering(recordings)], [STRENGTH])
    repo.write(folder)
    write_card(repo, folder)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
