"""Experts in 4 bit, in any MoE: which tensors they are, and the forward that unpacks few of them.

transformers keeps the experts of a layer in tensors ``(experts, ., .)``, which
``BitsAndBytesConfig(load_in_4bit=True)`` leaves in 16 bit. Here each of them becomes a
`PackedExperts` parametrization: whoever reads the weight gets it unpacked, and the experts
implementation below unpacks only those experts that a few tokens need.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from steered_moe.errors import QuantizationError
from steered_moe.memory import memory_by_part, report
from steered_moe.packed_experts import PackedExperts
from steered_moe.routers import find_routers

IMPLEMENTATION = "steered_moe_4bit"
"""Name of the experts implementation."""

FLAT: dict[str, str] = {"DbrxExpertGLU": "moe_num_experts"}
"""Classes whose experts lie one below the other in a matrix: the attribute that counts them."""

logger = logging.getLogger(__name__)


def quantize_experts_(
    model: PreTrainedModel, config: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Quantize the fused experts of a loaded model to 4 bit, in place; all else stays as it is.

    Args:
        model: Any MoE that is not quantized yet, steered or not.
        config: ``bnb_4bit_quant_type`` and ``bnb_4bit_use_double_quant``; nf4 without a config.

    Returns:
        The same model. Its packed experts keep the dtype that they had: cast it before.

    Raises:
        QuantizationError: No bitsandbytes, 8 bit, a model without fused experts, experts that are
            quantized already, or weights that are offloaded.
    """
    config = config or default_config(model.dtype)
    check_possible(config, getattr(model.config, "quantization_config", None))
    found = list(expert_parameters(model))
    if not found and memory_by_part(model)["experts"].bytes:
        raise QuantizationError(f"the experts of {type(model).__name__} are in 4 bit already")
    if not found:
        raise QuantizationError(
            f"{type(model).__name__} has no fused experts in 16 bit; lists of linear layers are "
            "quantized while loading, with load_in_4bit=True"
        )
    if absent := [f"{path}.{name}" for path, module, name in found if _is_meta(module, name)]:
        raise QuantizationError(f"{absent[0]} is offloaded; quantize a model that is in memory")
    for _, module, name in found:
        data, state = packed_of(module, name, config)
        register(module, name, data, state)
    finish(model)
    _tell_config(model, config)
    return model


def _tell_config(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """A checkpoint that the model saves says what is packed, and that linear layers are not."""
    from steered_moe.quantizer import ExpertsIn4bitConfig

    told = ExpertsIn4bitConfig.of(config)
    told.llm_int8_skip_modules = [
        path for path, module in model.named_modules() if type(module) is nn.Linear
    ]
    model.config.quantization_config = told


def default_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4, computed in the dtype of the model."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def check_possible(config: BitsAndBytesConfig, present: Any = None) -> None:
    """Refuse what cannot become 4 bit.

    Args:
        config: What is asked for.
        present: ``quantization_config`` of the model as it is.

    Raises:
        QuantizationError: Says why, and what to do instead.
    """
    if present is not None:
        method = present.get("quant_method") if isinstance(present, dict) else present.quant_method
        raise QuantizationError(
            f"the model is quantized already ({method}); load it without load_in_4bit, or take its "
            "checkpoint in 16 bit"
        )
    if not config.load_in_4bit:
        raise QuantizationError(
            "8 bit would leave the fused experts, most of a MoE, in 16 bit; use load_in_4bit=True"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QuantizationError("4 bit needs bitsandbytes: pip install 'steered-moe[quantization]'")


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and name of every weight that holds all experts of a layer.

    Args:
        model: On any device, the meta device too; what is packed already is left out.
    """
    inside = tuple(f"{router.path}." for router in find_routers(model))
    for path, module in model.named_modules():
        if "expert" not in f"{path} {type(module).__name__}".lower() or path.startswith(inside):
            continue
        for name, weight in module.named_parameters(recurse=False):
            stacked = weight.dim() == 3 and weight.shape[0] > 1
            if not name.endswith("bias") and (stacked or _counted_by(module)):
                yield path, module, name


def packed_of(
    module: nn.Module, name: str, config: BitsAndBytesConfig, weights: Tensor | None = None
) -> tuple[Tensor, PackedExperts]:
    """A weight of experts, packed; ``weights`` stand for those of the module."""
    weights = getattr(module, name).detach() if weights is None else weights
    stacked = weights.view(expert_shape(module, weights))
    data, state = PackedExperts.pack(
        stacked, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
    )
    return data, configured(state, weights.dim() == 2, config)


def configured(state: PackedExperts, flat: bool, config: BitsAndBytesConfig) -> PackedExperts:
    """Tell packed experts the shape to give back and what to compute in."""
    state.flat, state.compute_dtype = flat, config.bnb_4bit_compute_dtype
    return state


def expert_shape(module: nn.Module, weights: Tensor) -> tuple[int, ...]:
    """The shape of a weight with one row per expert."""
    if weights.dim() == 3:
        return tuple(weights.shape)
    experts = int(getattr(module, str(_counted_by(module))))
    return experts, weights.shape[0] // experts, weights.shape[1]


def _counted_by(module: nn.Module) -> str | None:
    """The attribute of `FLAT`; torch renames the class of a module that has a parametrization."""
    return FLAT.get(type(module).__name__.removeprefix("Parametrized"))


def register(module: nn.Module, name: str, data: Tensor, state: PackedExperts) -> None:
    """Put packed experts in the place of a weight."""
    setattr(module, name, nn.Parameter(data, requires_grad=False))
    parametrize.register_parametrization(module, name, state, unsafe=True)


def finish(model: PreTrainedModel) -> None:
    """Switch to the experts implementation, where there is a choice, and say what it weighs."""
    if any(hasattr(module, "has_gate") for module in model.modules()):
        model.set_experts_implementation(IMPLEMENTATION)
    report(model, logger)


def _is_meta(module: nn.Module, name: str) -> bool:
    """Whether a weight is not here."""
    return bool(getattr(module, name).is_meta)


class _View:
    """Experts of a layer as transformers' forward reads them: packed weights are unpacked, all of
    them or only those that are indexed, in the dtype to compute in."""

    def __init__(self, module: nn.Module, few: bool, dtype: torch.dtype) -> None:
        self.module, self.few, self.dtype = module, few, dtype

    def __getattr__(self, name: str) -> Any:
        steps: Any = self.module.parametrizations
        if name not in steps:
            return getattr(self.module, name)
        packed = _Indexed(steps[name].original, steps[name][0], self.dtype)
        return packed if self.few else packed[slice(None)]


class _Indexed:
    def __init__(self, data: Tensor, state: PackedExperts, dtype: torch.dtype) -> None:
        self.data, self.state, self.dtype = data, state, dtype

    def __getitem__(self, experts: Tensor | slice) -> Tensor:
        return self.state.pick(self.data, experts, self.dtype)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of packed experts, as transformers calls it.

    With at most as many choices as experts, each choice unpacks its expert; with more, the layer
    is unpacked as a whole. The arithmetic is that of transformers' ``batched_mm`` and
    ``grouped_mm``, in the compute dtype of the quantization config.

    Args:
        self: The experts of a layer.
        hidden_states: ``(tokens, hidden)``.
        top_k_index: ``(tokens, top_k)``.
        top_k_weights: ``(tokens, top_k)``.
    """
    few = top_k_index.numel() <= cast(int, self.num_experts)
    forward = batched_mm_experts_forward if few else grouped_mm_experts_forward
    states = [steps[0] for steps in getattr(self, "parametrizations", {}).values()]
    if not states:  # a layer whose experts were left in 16 bit
        return cast(Tensor, forward(self, hidden_states, top_k_index, top_k_weights))
    dtype = states[0].compute_dtype or hidden_states.dtype
    view = _View(self, few, dtype)
    result = forward(view, hidden_states.to(dtype), top_k_index, top_k_weights)
    return cast(Tensor, result.to(hidden_states.dtype))


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward
