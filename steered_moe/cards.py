"""The model card of a steering repo, written from what the repo really holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from steered_moe.card_text import BEGIN, END, merged
from steered_moe.corpora import KNOWN
from steered_moe.errors import FormatError
from steered_moe.heat_map import heat_map
from steered_moe.hub import CARD_FILE
from steered_moe.literature import METHOD_FACTS, Method, bibtex, cited, edits
from steered_moe.repo_config import is_path
from steered_moe.results import MEAN, Result, current, read_results
from steered_moe.steering import RouterSteering, ranges
from steered_moe.storage import SteeringRepo

PICTURES = "plots"
"""Folder of a steering repo for its pictures; ``plots/<name>.png`` belongs to that steering."""

_BASE_LABELS = {
    "base_model_name_or_path": "base model",
    "base_model_revision": "revision",
    "base_model_type": "type",
    "num_hidden_layers": "layers",
    "num_experts": "experts per layer",
    "num_experts_per_tok": "experts per token",
}


def write_card(repo: SteeringRepo, folder: str | Path, repo_id: str = ".") -> None:
    """Write ``README.md``; text that somebody wrote into it outside the generated part is kept.

    Args:
        repo: What the card describes.
        folder: The steering repo, whose results and pictures the card shows.
        repo_id: Its id on the Hub; by default the folder itself.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    old = path.read_bytes() if path.is_file() else b""
    pictures = {p.stem for p in (folder / PICTURES).glob("*.png")}
    results = current(read_results(folder), repo.steerings)
    card = render_card(repo, repo_id, results, pictures)
    try:
        path.write_text(merged(card, old.decode("utf-8")), encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8: {error}; save it as UTF-8") from error


def render_card(
    repo: SteeringRepo,
    repo_id: str = ".",
    results: Sequence[Result] = (),
    pictures: set[str] | frozenset[str] = frozenset(),
) -> str:
    """The card as text.

    Args:
        repo: Base and steerings.
        repo_id: What to load it by.
        results: What was measured; without any, the card says "Not evaluated".
        pictures: Names of the steerings that have a picture in `PICTURES`.
    """
    first = repo.default or repo.steerings[0].name
    several, here = len(repo.steerings) > 1, json.dumps(repo_id, ensure_ascii=False)
    card = ModelCard.from_template(
        _metadata(repo, repo_id, results),
        template_path=str(_template()),
        begin=BEGIN,
        end=END,
        title=_title(repo),
        base=_base_rows(repo),
        steerings=[_section(repo, row, pictures) for row in range(len(repo.steerings))],
        results=_tables(results),
        repo_id=here,
        arguments=f'{here}, steering="{first}"' if several else here,
        arguments_of_load=f'{here}, "{first}"' if several else here,
        strength=repo.strengths[[s.name for s in repo.steerings].index(first)],
        limits=_limits(repo, results),
        citations=[bibtex(source) for source in _sources(repo)],
    )
    return str(card).rstrip("\n") + "\n"


def _template() -> Path:
    """In a wheel it lies in the package, in a checkout beside it."""
    shipped = Path(__file__).parent / "hub_cards"
    return (shipped if shipped.is_dir() else shipped.parent.parent / "hub_cards") / "template.md"


def code(value: Any) -> str:
    """A value from a file as a code span, in which nothing is markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = re.sub(r"\s+", " ", text).replace("`", "'").replace("<!--", "<!- -").strip()
    text = re.sub(r"\\+(?=\|)", "/", text).replace("|", r"\|")  # a backslash would undo the escape
    return f"`{text}`" if text else ""


def _metadata(repo: SteeringRepo, repo_id: str, results: Sequence[Result]) -> ModelCardData:
    base = repo.base.get("base_model_name_or_path")
    on_hub = base is not None and not is_path(base)
    listed = {text for s in repo.steerings for text in s.provenance.get("languages", [])}
    languages = {re.split("[_-]", code)[0].lower() for code in listed}
    corpora = {text for s in repo.steerings for text in s.provenance.get("corpora", [])}
    return ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="steered-moe",
        pipeline_tag="text-generation",
        language=sorted(x for x in languages if re.fullmatch("[a-z]{2,3}", x)) or None,
        datasets=sorted({KNOWN[text].repo for text in corpora if text in KNOWN}) or None,
        tags=["steered-moe", "mixture-of-experts", "router-steering"],
        model_name=_title(repo).replace("`", "") if results else None,
        eval_results=[result.model_index() for result in results] or None,
    )


def _title(repo: SteeringRepo) -> str:
    base = repo.base.get("base_model_name_or_path")
    model = code(base.rpartition("/")[2]) if base else ""
    return ", ".join(s.name for s in repo.steerings) + (f" for {model}" if model else "")


def _base_rows(repo: SteeringRepo) -> list[tuple[str, Any]]:
    rows = [(label, repo.base.get(name)) for name, label in _BASE_LABELS.items()]
    return [(label, code(value)) for label, value in rows if value is not None]


def _section(repo: SteeringRepo, row: int, pictures: set[str] | frozenset[str]) -> dict[str, Any]:
    steering = repo.steerings[row]
    picture = f"{PICTURES}/{steering.name}.png" if steering.name in pictures else None
    return {
        "name": steering.name,
        "does": _does(steering),
        "rows": _rows(repo, row),
        "picture": picture,
        "heat_map": heat_map(steering),
    }


def _does(steering: RouterSteering) -> str:
    name = steering.provenance.get("method")
    fact = METHOD_FACTS.get(name) if isinstance(name, str) else None
    count = len(steering.layers)
    where = f"in {count} layer{'s' * (count > 1)} ({ranges(steering.layers)}, counted from 0)"
    if fact is None:
        return f"It edits {steering.num_steered_experts} router logits {where}."
    source = f" ({cited(fact)})" if fact.source else ""
    return f"It {fact.does}{source}, {where}."


def _rows(repo: SteeringRepo, row: int) -> list[tuple[str, str]]:
    steering = repo.steerings[row]
    weights, force = steering.weights, steering.force
    origin = {k: v for k, v in steering.provenance.items() if k != "corpora"}
    rows: dict[str, Any] = {
        "edit": "; ".join(map(_formula, edits(steering))),
        "strength": code(repo.strengths[row]),
        "layers": code(ranges(steering.layers)),
        "router logits edited": code(steering.num_steered_experts),
        "weights": code(f"{float(weights.min()):.4g} to {float(weights.max()):.4g}")
        if weights.any()
        else "",
        "forced": code(int((force > 0).sum())) if force is not None else "",
        "banned": code(int((force < 0).sum())) if force is not None else "",
        **{code(key): code(value) for key, value in origin.items()},
        "corpora": "; ".join(map(_corpus, steering.provenance.get("corpora", []))),
        "fingerprint": code(steering.fingerprint),
    }
    return [(name, value) for name, value in rows.items() if value]


def _formula(edit: Method) -> str:
    return code(edit.does) + (f", {cited(edit)}" if edit.source else "")


def _corpus(text: str) -> str:
    if text not in KNOWN:
        return code(text)
    dataset = KNOWN[text]
    return f"[{dataset.repo}](https://huggingface.co/datasets/{dataset.repo}), {dataset.licence}"


def _tables(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One table for each steering, strength, task and metric."""
    groups: dict[tuple[str, float, str, str], list[Result]] = {}
    for result in results:
        key = (result.steering, result.strength, result.task, result.metric)
        groups.setdefault(key, []).append(result)
    return [_table(*key, rows) for key, rows in groups.items()]


def _table(
    steering: str, strength: float, task: str, metric: str, results: Sequence[Result]
) -> dict[str, Any]:
    controls = list(dict.fromkeys(name for result in results for name in result.controls))
    return {
        "caption": f"{code(steering)} at strength {strength:g}: {code(metric)} on {code(task)}.",
        "controls": [f"control: {code(name)}" for name in controls],
        "rows": [
            [
                code(result.language),
                result.items,
                f"{result.base:.4f}",
                f"{result.steered:.4f}",
                result.gain,
                *(result.controls.get(name, "") for name in controls),
            ]
            for result in results
        ],
    }


def _limits(repo: SteeringRepo, results: Sequence[Result]) -> list[str]:
    base: Mapping[str, Any] = repo.base
    shape = [(base.get("num_hidden_layers"), "layers"), (base.get("num_experts"), "experts")]
    size = " and ".join(f"{count} {what}" for count, what in shape if count is not None)
    lines = [
        "It acts on every token in every language, English too; at strength 0 it does nothing."
    ]
    if size:
        lines.append(f"It fits models with {size} only; another one is refused when it is loaded.")
    languages = {result.language for result in results if not result.language.startswith(MEAN)}
    measured = sorted(map(code, languages))
    lines.append(
        f"Measured for {', '.join(measured)}; what it does elsewhere is unknown."
        if measured
        else "What it gains, or loses, has not been measured."
    )
    return lines


def _sources(repo: SteeringRepo) -> list[str]:
    """arXiv numbers of the methods and edits of a repo, each once."""
    facts = [METHOD_FACTS.get(str(s.provenance.get("method"))) for s in repo.steerings]
    facts += [edit for s in repo.steerings for edit in edits(s)]
    return list(dict.fromkeys(fact.source for fact in facts if fact and fact.source))
