"""The base model of a steering repo: where it is, whether it fits, how it is loaded."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steered_moe import hub
from steered_moe.combining import combine
from steered_moe.configuration import SteeredMoEConfig
from steered_moe.errors import BaseModelError, FormatError, QuantizationError
from steered_moe.fit import ModelShape, check_fit, check_force
from steered_moe.quantizer import ExpertsIn4bitConfig, config_for
from steered_moe.repo_config import is_path
from steered_moe.routers import Router, find_routers
from steered_moe.steering import RouterSteering
from steered_moe.storage import SteeringRepo
from steered_moe.strength import as_rows

logger = logging.getLogger(__name__)

_AUTO_KWARGS = ("adapter_kwargs", "_from_auto", "_commit_hash", "subfolder", "proxies")
_SWALLOWED = {
    "attn_implementation": "_attn_implementation_internal",
    "experts_implementation": "_experts_implementation_internal",
    "output_hidden_states": "output_hidden_states",
    "output_attentions": "output_attentions",
}
"""Keyword arguments that AutoConfig puts into the config it reads, here the steering's."""


def load_base(
    base: str, revision: str | None, repo: SteeringRepo, *model_args: Any, **kwargs: Any
) -> PreTrainedModel:
    """Check a steering repo against the base's config, then load the base's weights.

    Args:
        base: Hub id or folder.
        revision: Revision of the base.
        repo: The steerings, and what the repo says of its base.
        model_args: For ``AutoModelForCausalLM.from_pretrained``.
        kwargs: For the same; ``use_safetensors`` is on unless it is given.

    Raises:
        BaseModelError: Another model type, or wrong layers, experts or top-k.
        RouterError: The base has no router that can be steered.
        QuantizationError: It cannot be loaded in 4 bit.
    """
    # Left open, transformers would ask on the terminal whether to run code of the base.
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    names = (*hub.KWARGS, "trust_remote_code")
    config_kwargs = {name: kwargs[name] for name in names if name in kwargs}
    config = AutoConfig.from_pretrained(base, revision=revision, **config_kwargs)
    check_base(repo, config, kwargs["trust_remote_code"])
    _ask_for_4bit(kwargs, config)
    kwargs.setdefault("use_safetensors", True)  # a repo that names a base must not bring a pickle
    return AutoModelForCausalLM.from_pretrained(base, *model_args, revision=revision, **kwargs)


def _ask_for_4bit(kwargs: dict[str, Any], config: Any) -> None:
    """Turn ``load_in_4bit`` or a config of bitsandbytes into one that takes experts along."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    asked = kwargs.pop("quantization_config", None)
    loose = {k: kwargs.pop(k) for k in list(kwargs) if k == "load_in_8bit" or k[:8] == "bnb_4bit"}
    if loose:
        raise QuantizationError(
            f"{', '.join(loose)}: put it into quantization_config=BitsAndBytesConfig(...); 8 bit "
            "would leave the fused experts in 16 bit"
        )
    quantization = config_for(
        asked,
        kwargs.pop("load_in_4bit", False),
        config.dtype if dtype in (None, "auto") else dtype,
        getattr(config, "quantization_config", None),
    )
    if quantization is None:
        return
    kwargs["quantization_config"] = quantization
    if isinstance(quantization, ExpertsIn4bitConfig) and "experts_implementation" in kwargs:
        raise QuantizationError(
            f"experts_implementation={kwargs['experts_implementation']!r}: experts in 4 bit have "
            "one of their own; leave it out"
        )


def check_base(repo: SteeringRepo, config: Any, trust_remote_code: bool = False) -> None:
    """Check that every steering of a repo fits a model of this config, without any weight.

    Raises:
        RouterError: A model without routers, or whose routers cannot be steered.
        BaseModelError: Another model type, or wrong layers, experts or top-k, with value and fix.
    """
    expected = repo.base.get("base_model_type")
    if expected not in (None, config.model_type):
        name = config.name_or_path or "this base model"
        raise BaseModelError(
            f"the steering was made for a {expected!r} model but {name} is {config.model_type!r}; "
            "load the base model that the steering names"
        )
    model, shape = _without_weights(config, trust_remote_code)
    for name, found in shape.fields.items():
        if repo.base.get(name) not in (None, found):
            raise BaseModelError(
                f"the steering was made for {name}={repo.base[name]} but this base model has "
                f"{found}; load the base model that the steering names"
            )
    for steering in repo.steerings:
        check_fit(steering, shape, model)
    names = [steering.name for steering in repo.steerings]
    rows = {n: as_rows(x) for n, x in zip(names, repo.strengths, strict=True)}
    for layer, parts in combine(dict(zip(names, repo.steerings, strict=True)), rows).items():
        check_force(parts.get("force"), layer, shape.top_k[layer])


def routers_of(repo: SteeringRepo, base: str, revision: str | None) -> dict[int, Router]:
    """Layer -> router of a base model of which only the config is read; they have no weights.

    Raises:
        RouterError, BaseModelError: As `check_base`.
    """
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    check_base(repo, config)
    model, _ = _without_weights(config, trust_remote_code=False)
    return {router.layer: router for router in find_routers(model)}


def _without_weights(config: Any, trust_remote_code: bool) -> tuple[PreTrainedModel, ModelShape]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model, ModelShape.of(find_routers(model), model)


def repo_for(
    steering: RouterSteering,
    strength: float,
    base: str,
    revision: str | None,
    folder: Path,
    token: str | bool | None = None,
) -> SteeringRepo:
    """A steering repo for a base model of which only the config is read.

    Args:
        steering: What it holds.
        strength: Its strength.
        base: Hub id or folder of the base model.
        revision: Revision of the base on the Hub.
        folder: Where the repo will be; a base in a folder is named relative to it.
        token: As huggingface_hub takes it.

    Raises:
        BaseModelError: The steering does not fit the model.
        RouterError: A model without routers.
    """
    config = AutoConfig.from_pretrained(
        base, revision=revision, trust_remote_code=False, token=token
    )
    _, shape = _without_weights(config, trust_remote_code=False)
    fields = {
        "base_model_name_or_path": portable(base, folder),
        "base_model_revision": revision,
        "base_model_type": config.model_type,
        **shape.fields,
    }
    repo = SteeringRepo(fields, [steering], [strength])
    check_base(repo, config)
    return repo


def locate_base(
    repo: SteeringRepo, folder: Path, override: str | os.PathLike[str] | None
) -> tuple[str, str | None]:
    """Name and revision of the base; a relative path counts from the steering repo's folder."""
    if override is not None:
        return hub.split(os.fspath(override))
    recorded = repo.base.get("base_model_name_or_path")
    if not recorded:
        raise BaseModelError(f"{folder} names no base model; pass base_model='...'")
    if is_path(recorded) and hub.from_hub(folder):
        raise BaseModelError(
            f"the base model is {recorded}, a folder of whoever made this steering; nothing on "
            "this machine is loaded for it. Pass base_model='...'"
        )
    if recorded.startswith(("./", "../")):
        return str((folder / recorded).resolve()), None
    return recorded, repo.base.get("base_model_revision")


def portable(name: str | None, folder: Path) -> str | None:
    """A local base is recorded relative to the steering repo, so that both can move together."""
    if name is None:
        logger.warning("the base model has no name, so loading this steering needs base_model=")
        return None
    if not Path(name).is_dir():
        return name
    relative = os.path.relpath(Path(name).resolve(), folder.resolve())
    return relative if relative.startswith("..") else f"./{relative}"


def warn_of_other_revision(repo: SteeringRepo, base: str, commit: str | None) -> None:
    """Say so when the base that was loaded is not the one that the steering was made for."""
    recorded = repo.base.get("base_model_revision")
    if recorded is None or recorded == commit:
        return
    if commit is None:
        logger.info("%s does not say which commit it is of; the steering wants %s", base, recorded)
    elif re.fullmatch("[0-9a-f]{40}", recorded):
        logger.warning(
            "the steering was made for commit %s of %s, but %s is at commit %s; its effect may "
            "differ",
            recorded,
            repo.base.get("base_model_name_or_path"),
            base,
            commit,
        )


def arguments_for_base(config: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for loading the base: what AutoModel adds is left out, what it took is put back.

    Raises:
        FormatError: ``subfolder``, which a steering repo does not have.
    """
    if kwargs.get("subfolder"):
        raise FormatError(
            f"subfolder={kwargs['subfolder']!r}: a steering repo has its files at the top"
        )
    taken = {name: getattr(config, attribute, None) for name, attribute in _SWALLOWED.items()}
    taken = {name: value for name, value in taken.items() if value not in (None, False)}
    return taken | {key: value for key, value in kwargs.items() if key not in _AUTO_KWARGS}


def check_unchanged(config: Any, repo: SteeringRepo) -> None:
    """AutoModel puts arguments that are fields of the repo's config there: none may be changed.

    Raises:
        BaseModelError: Names the field, or a config that is not of a steering repo.
    """
    if config is None:
        return
    if not isinstance(config, SteeredMoEConfig):
        raise BaseModelError(
            f"config is a {type(config).__name__}; to steer a base model with a config of your "
            "own, load it first and use SteeredMoEForCausalLM.from_base(model, steering)"
        )
    for name, recorded in repo.base.items():
        if getattr(config, name) != recorded:
            raise BaseModelError(
                f"{name}={getattr(config, name)!r} cannot be changed when a steering is loaded "
                f"(it is {recorded!r}); load the base first and use from_base(model, steering)"
            )
