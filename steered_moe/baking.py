"""A steering into the weights of a plain checkpoint, where a family's routers have a bias for it.

A steering of the scale "none" adds a number to an expert's logit for every token. So does the bias
of a router that has one, as in gpt-oss. Which routers do is not listed here: `bias_of` tries it on
a router of the family, and a bias that acts on the selection alone (DeepSeek's correction bias)
does not pass.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steered_moe import hub
from steered_moe.base_model import locate_base, routers_of
from steered_moe.combining import constant_tables
from steered_moe.edit import Edit
from steered_moe.errors import BaseModelError, FormatError, RouterError, SteeringError
from steered_moe.routers import Router
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.trial import Trial

_WEIGHTS = "*.safetensors"
_LEFT_OUT = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors", ".py")
_CARD = "README.md"

logger = logging.getLogger(__name__)


def bake(
    repo: str,
    out: str | Path,
    *,
    strength: float | Mapping[str, float] | None = None,
    steering: str | None = None,
    base_model: str | None = None,
) -> dict[str, float]:
    """Write a copy of the base checkpoint that answers as the steered model does, everywhere.

    Args:
        repo: Steering repo: a folder, a Hub id, ``id@revision``.
        out: Folder to write; new or empty.
        strength: Overrides the recorded one.
        steering: One of several; all of them by default.
        base_model: Overrides the recorded base model.

    Returns:
        Name of each changed tensor -> the largest difference between what it holds and what it
        should, from rounding to its dtype.

    Raises:
        SteeringError: Anything but a scale of "none" with a strength other than 0, or a change
            that the dtype of a bias rounds away or cannot hold.
        RouterError: Routers without such a bias; names the model type.
        BaseModelError: The steering does not fit, or the checkpoint lacks a tensor.
        FormatError: ``out`` holds something, or the checkpoint has no safetensors. Nothing is
            written in any of these cases.
    """
    place = hub.fetch(repo)
    found = read_repo(place).only(steering)
    found = found if strength is None else found.at(strength)
    added = _constants(found)
    name, revision = locate_base(found, place, base_model)
    tensors = _tensors(found, added, name, revision)
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FormatError(f"{target} is not empty; bake into a folder of its own")
    source = Path(name) if Path(name).is_dir() else _download(name, revision)
    changed = _changed(source, tensors)
    target.mkdir(parents=True, exist_ok=True)
    _write(source, target, {key: tensor for key, (tensor, _) in changed.items()})
    _write_card(found, repo, name, target)
    return {key: error for key, (_, error) in changed.items()}


def _constants(repo: SteeringRepo) -> dict[int, Tensor]:
    """Layer -> what is added to each expert's logit, ``(experts,)``."""
    found = constant_tables(repo)
    if not found:
        raise SteeringError("at this strength nothing is steered; the base is that checkpoint")
    for layer, parts in found.items():
        if other := sorted(set(parts) - {"none"}):
            raise SteeringError(
                f"layer {layer} has an edit of the kind {other[0]!r}, which depends on the token; "
                "only the scale 'none' adds the same to every token and can be baked"
            )
    return {layer: parts["none"] for layer, parts in found.items()}


def _tensors(
    repo: SteeringRepo, added: Mapping[int, Tensor], name: str, revision: str | None
) -> dict[str, Tensor]:
    """Name of a tensor of the checkpoint -> what is added to it."""
    routers = routers_of(repo, name, revision)
    found = {}
    for layer in added:
        router = routers[layer]
        if (bias := bias_of(router)) is None:
            raise RouterError(
                f"{type(router.module).__name__} in layer {layer} has no bias that is added to its "
                "logits; load the steering with steered-moe instead"
            )
        found[f"{router.path}.{bias}"] = added[layer]
    return found


def bias_of(router: Router) -> str | None:
    """The parameter of a router that acts as a steering of the scale "none" does, found by trying.

    Args:
        router: Of a model with or without weights; a copy with random ones is tried.
    """
    shape = (router.weight_shape[0],)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for name, parameter in router.module.named_parameters():
        if tuple(parameter.shape) == shape:
            trial = Trial(router)
            steered = trial.weights(Edit(router.num_experts, none=delta[None]))
            trial.module.get_parameter(name).data += delta
            if torch.allclose(trial.weights(), steered, atol=1e-4):
                return name
    return None


def _download(name: str, revision: str | None) -> Path:
    """The files at the top of a checkpoint on the Hub."""
    patterns = [f"*{ending}" for ending in _LEFT_OUT if ending != ".safetensors"]
    return Path(snapshot_download(name, revision=revision, ignore_patterns=["*/*", *patterns]))


def _changed(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """Name -> the new tensor and its error, before anything is written."""
    found = {}
    files = sorted(source.glob(_WEIGHTS))
    if not files:
        raise FormatError(f"{source} holds no safetensors; convert the checkpoint first")
    for file in files:
        with safe_open(file, "pt") as shard:
            for name in set(shard.keys()) & set(tensors):
                found[name] = _added(name, shard.get_tensor(name), tensors[name])
    if missing := sorted(set(tensors) - set(found)):
        raise BaseModelError(f"the checkpoint has no tensor {missing[0]}; its names are its own")
    return found


def _write(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint, shard by shard, with other tensors of these names."""
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        if file.suffix == ".safetensors":
            _write_shard(file, target / file.name, tensors)
        elif file.suffix not in _LEFT_OUT and file.name != _CARD:
            shutil.copyfile(file, target / file.name)


def _write_shard(file: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(file, "pt") as shard:
        names = set(shard.keys())
        if not names & set(tensors):
            shutil.copyfile(file, target)
            return
        content = {name: shard.get_tensor(name) for name in names}
        metadata = shard.metadata()
    save_file(content | {k: v for k, v in tensors.items() if k in names}, target, metadata=metadata)


def _added(name: str, bias: Tensor, delta: Tensor) -> tuple[Tensor, float]:
    """The changed bias in its own dtype, and the largest error from rounding."""
    exact = bias.double().clone()
    exact[: len(delta)] += delta.double()
    found = exact.to(bias.dtype)
    if not found.isfinite().all():
        raise SteeringError(f"{name} would not be finite in {bias.dtype}; use a smaller strength")
    lost = (delta != 0) & (found == bias)[: len(delta)]
    if lost.any():
        expert = int(lost.nonzero()[0])
        raise SteeringError(
            f"{name}, expert {expert}: adding {float(delta[expert]):g} to {float(bias[expert]):g} "
            f"changes nothing in {str(bias.dtype).removeprefix('torch.')}; use a larger strength"
        )
    error = float((found.double() - exact).abs().max())
    logger.info("%s: rounded by at most %g", name, error)
    return found, error


def _write_card(repo: SteeringRepo, origin: str, base: str, target: Path) -> None:
    """What was baked, for people."""
    lines: Iterator[str] = (
        f"* `{one.name}` at strength {strength}, fingerprint `{one.fingerprint}`"
        for one, strength in zip(repo.steerings, repo.strengths, strict=True)
    )
    head = f"---\nbase_model: {base}\ntags: [steered-moe]\n---\n" if not Path(base).is_dir() else ""
    text = (
        f"{head}# {Path(base).name}, steered\n\nThe weights of `{Path(base).name}` with steerings "
        f"of `{Path(origin).name}` added to the biases of its routers, by `steered-moe bake`:\n\n"
    )
    (target / _CARD).write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
