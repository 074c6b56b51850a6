"""The model card of a steering repo, written from what the repo really holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from steered_moe.errors import SteeredMoEError
from steered_moe.steering import RouterSteering
from steered_moe.storage import CARD_FILE, SteeringRepo, read_repo

SCALE_FORMULAS: Mapping[str, str] = {
    "std": "z_e + strength * weight_e * std(z), arXiv 2510.04694 Eq. 4",
    "abs": "z_e + strength * weight_e * |z_e|, arXiv 2601.14050 (released code)",
    "none": "z_e + strength * weight_e",
}
_SHADES = " .:-=+*#%@"


def write_card(repo: SteeringRepo, folder: str | Path) -> None:
    """Write ``README.md``."""
    (Path(folder) / CARD_FILE).write_text(render_card(repo), encoding="utf-8")


def has_edited_card(folder: str | Path) -> bool:
    """Whether a folder has a card that is not the one its steering repo would get."""
    path = Path(folder) / CARD_FILE
    if not path.exists():
        return False
    try:
        return path.read_text(encoding="utf-8") != render_card(read_repo(folder))
    except SteeredMoEError:
        return True


def render_card(repo: SteeringRepo) -> str:
    """The card as text: Hub metadata, what is steered, how to load it."""
    return f"---\n{_metadata(repo).to_yaml()}\n---\n\n" + "\n".join(
        [
            f"# {_title(repo)}",
            "",
            "Router steering for a Mixture-of-Experts language model: the logits of its routers "
            "are edited at inference time. No weight is changed, and none is in this repo.",
            "",
            *_base_lines(repo),
            *(line for steering in repo.steerings for line in _steering_lines(repo, steering)),
            "## Load",
            "",
            "```python",
            "from steered_moe import SteeredMoEForCausalLM",
            "",
            'model = SteeredMoEForCausalLM.from_pretrained("this/repo")',
            "```",
            "",
            "## Evaluation",
            "",
            "Not evaluated.",
            "",
        ]
    )


def heat_map(steering: RouterSteering, width: int = 64) -> list[str]:
    """Layer x expert picture in text, one line per layer; neighbours share a column if need be.

    A digit of ``" .:-=+*#%@"`` is the largest absolute weight in the column relative to the
    largest of all, ``+`` and ``x`` at the end of the line count forced and banned experts.
    """
    weights = steering.weights.abs()
    groups = weights.tensor_split(min(width, steering.num_experts), dim=1)
    top = float(weights.max()) or 1.0
    lines = []
    for row, layer in enumerate(steering.layers.tolist()):
        levels = [float(group[row].max()) / top for group in groups]
        cells = "".join(_SHADES[round(level * (len(_SHADES) - 1))] for level in levels)
        lines.append(f"{layer:>4} |{cells}|{_force_note(steering, row)}")
    return lines


def _force_note(steering: RouterSteering, row: int) -> str:
    if steering.force is None:
        return ""
    force = steering.force[row]
    return f" +{int((force > 0).sum())} x{int((force < 0).sum())}"


def _metadata(repo: SteeringRepo) -> ModelCardData:
    languages = [code for s in repo.steerings for code in s.provenance.get("languages", [])]
    base = repo.base.get("base_model_name_or_path")
    local = base is None or str(base).startswith(".")
    return ModelCardData(
        base_model=None if local else base,
        base_model_relation=None if local else "adapter",
        library_name="steered-moe",
        pipeline_tag="text-generation",
        language=sorted(set(languages)) or None,
        tags=["steered-moe", "mixture-of-experts", "router-steering"],
    )


def _title(repo: SteeringRepo) -> str:
    base = repo.base.get("base_model_name_or_path") or "an unnamed base model"
    return f"{', '.join(s.name for s in repo.steerings)} for {str(base).rpartition('/')[2]}"


def _base_lines(repo: SteeringRepo) -> list[str]:
    rows = {name: value for name, value in repo.base.items() if value is not None}
    return ["| base model | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""]


def _steering_lines(repo: SteeringRepo, steering: RouterSteering) -> list[str]:
    strength = dict(zip(repo.steerings, repo.strengths, strict=True))[steering]
    layers = steering.layers.tolist()
    rows: dict[str, Any] = {
        "edit": SCALE_FORMULAS[steering.scale],
        "strength": strength,
        "layers (0-based)": f"{layers[0]} to {layers[-1]}, {len(layers)} of them",
        "experts steered": steering.num_steered_experts,
        **{key: _plain(value) for key, value in steering.provenance.items()},
        "fingerprint": steering.fingerprint,
    }
    return [
        f"## {steering.name}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()),
        "",
        "```text",
        *heat_map(steering),
        "```",
        "",
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
