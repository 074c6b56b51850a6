"""The model type ``steered-moe`` of lm-eval: its Hugging Face backend with a steering attached.

Importing this module registers it, for ``lm_eval.simple_evaluate(model="steered-moe",
model_args="pretrained=user/x,strength=1.0", ...)`` and for ``steered-moe lm-eval``.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoTokenizer

from steered_moe import hub
from steered_moe.base_model import locate_base
from steered_moe.embedded import named_model, named_repo
from steered_moe.encoding import input_device
from steered_moe.errors import SteeredMoEError
from steered_moe.loading import check_dtype
from steered_moe.modeling import SteeredMoEForCausalLM
from steered_moe.storage import read_repo
from steered_moe.strength import Strength

MODEL_TYPE = "steered-moe"
CPU_BATCH = 8
"""What ``batch_size=auto`` is on a CPU, where a batch that is too large ends the process."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "autogptq": "a steered base model is quantized with load_in_4bit=True",
        "gptqmodel": "a steered base model is quantized with load_in_4bit=True",
        "gguf_file": "a steered base model is loaded from safetensors",
        "delta": "merge the delta into a base model of its own and name that with base_model=",
        "subfolder": "a steering repo has its files at the top",
        "backend": "a steered model is always a causal one",
    }
)
"""Arguments of lm-eval's Hugging Face backend that would have no effect here, or another one."""

_LIMITS = ("max_memory_per_gpu", "max_cpu_memory", "offload_folder")
_OWN = ("pretrained", "strength", "steering", "base_model", "revision", "quantization_config")
_FOR_BASE = (
    *("load_in_4bit", "device_map", "attn_implementation", "experts_implementation"),
    *("use_safetensors", *hub.KWARGS),
)
_CACHE_KEY = "steered-moe"  # answers in a cache have a hash as their key

logger = logging.getLogger(__name__)


@register_model(MODEL_TYPE)
class SteeredMoELM(HFLM):
    """A steering repo as lm-eval asks it. The tokenizer is that of the base model.

    Args:
        pretrained: Steering repo: a folder, a Hub id, ``id@revision``, or the word embedded.
        strength: Overrides the recorded strengths.
        steering: Which steerings of the repo, by name.
        base_model: Overrides the recorded base model.
        revision: Of the steering repo.
        quantization_config: As `SteeredMoEForCausalLM.from_pretrained` takes it.
        kwargs: As lm-eval's ``HFLM`` takes them, and of those that it hands on to
            ``from_pretrained``: ``load_in_4bit``, ``device_map`` and a few more.

    Raises:
        SteeredMoEError: An argument that is unknown or would have no effect, a steering repo that
            cannot be read, or one that does not fit its base model.
    """

    AUTO_MODEL_CLASS = SteeredMoEForCausalLM

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        strength: Strength | Mapping[str, Strength] | None = None,
        steering: str | Sequence[str] | None = None,
        base_model: str | None = None,
        revision: str | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(pretrained, kwargs)
        self._hub = {name: kwargs[name] for name in hub.KWARGS if name in kwargs}
        base_model = None if base_model is None else named_model(base_model)
        self._folder = hub.fetch(named_repo(str(pretrained)), revision, **self._hub)
        repo = read_repo(self._folder).only(steering)
        self._base, self._base_revision = locate_base(repo, self._folder, base_model)
        self._loading = {
            **{"strength": strength, "steering": steering, "base_model": base_model},
            **{"revision": None, "quantization_config": quantization_config},  # of this folder
        }
        self._placed = kwargs.get("device_map") is not None
        kwargs["parallelize"] = self._placed or kwargs.get("parallelize", False)
        kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, revision=revision, **kwargs)
        self.revision = revision

    def _get_config(self, pretrained: str, *, trust_remote_code: bool = False, **_: Any) -> None:
        self._config = AutoConfig.from_pretrained(
            self._base,
            revision=self._base_revision,
            trust_remote_code=bool(trust_remote_code),
            **self._hub,
        )

    def _create_tokenizer(
        self,
        pretrained: str,
        tokenizer: Any,
        *,
        trust_remote_code: bool = False,
        use_fast_tokenizer: bool = True,
        add_bos_token: bool | None = None,
        **_: Any,
    ) -> None:
        if tokenizer is not None and not isinstance(tokenizer, str):
            self.tokenizer = tokenizer
            return
        name, revision = (tokenizer, None) if tokenizer else (self._base, self._base_revision)
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=bool(trust_remote_code),
            use_fast=use_fast_tokenizer,
            **options,
            **self._hub,
        )

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        super()._create_model(str(self._folder), **{**kwargs, **self._loading})
        if self._placed:
            self._device = input_device(self._model)

    def _get_accelerate_args(
        self, parallelize: bool | None = None, device_map: Any = None, **limits: Any
    ) -> dict[str, Any]:
        """As lm-eval's, which without ``parallelize`` forgets the caller's ``device_map``."""
        args: dict[str, Any] = super()._get_accelerate_args(parallelize, device_map, **limits)
        if device_map is not None:
            args |= {"device_map": device_map, "max_memory": args.get("max_memory") or None}
        return args

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return int(super()._detect_batch_size(requests, pos))
        size = min(CPU_BATCH, int(self.max_batch_size))
        logger.info("batch_size=auto is %d on a CPU; give a number for another", size)
        return size

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results, under ``config``."""
        model = self.model
        return {
            "model_num_parameters": model.num_parameters(),
            "model_dtype": str(model.dtype),
            "model_revision": self.revision,
            "model_sha": hub.commit_of(str(self._folder), None) or "",
            "base_model": self._base,
            "base_model_revision": model.base_model_revision,
            "quantization": _method(getattr(model.config, "quantization_config", None)),
            "steerings": [
                {"name": n, "fingerprint": s.fingerprint, "strength": model.strengths[n]}
                for n, s in model.steerings.items()
            ],
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's cache of answers, which knows them by their prompts alone.

        Raises:
            SteeredMoEError: It holds answers of another model or strength.
        """
        known = cache_hook.dbdict
        if known is not None:
            mine = json.dumps({**self.get_model_info(), "peft": self.peft}, sort_keys=True)
            if len(known) and known.get(_CACHE_KEY) != mine:
                raise SteeredMoEError(
                    "--use_cache names a cache with answers of another model, steering or "
                    "strength; give each of them a cache of its own"
                )
            known[_CACHE_KEY] = mine
        super().set_cache_hook(cache_hook)


def check_arguments(pretrained: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that would be ignored.

    Raises:
        SteeredMoEError: Names the argument and what to do.
    """
    if not isinstance(pretrained, str):
        raise SteeredMoEError(
            "pretrained= names no steering repo; for a model that is loaded already use lm-eval's "
            "own HFLM(pretrained=model, tokenizer=tokenizer)"
        )
    taken = {name for name in inspect.signature(HFLM.__init__).parameters if name != "kwargs"}
    known = (taken | {*_OWN, *_FOR_BASE}) - {"self", *REFUSED}
    for name, value in kwargs.items():
        if name in REFUSED:
            raise SteeredMoEError(f"{name}={value!r}: {REFUSED[name]}")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}" if near else f"it takes {', '.join(sorted(known))}"
            raise SteeredMoEError(f"{MODEL_TYPE} takes no argument {name!r}; {hint}")
    _check_placing(kwargs)
    if isinstance(dtype := kwargs.get("dtype"), str):
        check_dtype(dtype)


def _check_placing(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("parallelize") or kwargs.get("device_map") is not None:
        return
    if unused := [name for name in _LIMITS if kwargs.get(name) is not None]:
        raise SteeredMoEError(f"{', '.join(unused)}: needs parallelize=True or device_map=auto")


def _method(config: Any) -> str | None:
    """How a model is quantized; the config of one that is not yet loaded is a dict."""
    found = config.get("quant_method") if isinstance(config, dict) else config
    method = getattr(found, "quant_method", found)
    return None if method is None else str(getattr(method, "value", method))
