"""Load a MoE in 4 bit, experts too, tensor by tensor: a quantizer registered with transformers.

``SteeredMoEForCausalLM.from_pretrained(repo, load_in_4bit=True)`` uses it, and so does
``AutoModelForCausalLM.from_pretrained(base, quantization_config=ExpertsIn4bitConfig())``. A
checkpoint that the loaded model saves is loaded again after ``import steered_moe.quantizer``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from steered_moe.errors import QuantizationError
from steered_moe.packed_experts import PackedExperts
from steered_moe.quantization import (
    check_possible,
    configured,
    default_config,
    expert_parameters,
    expert_shape,
    finish,
    packed_of,
    register,
)
from steered_moe.routers import find_routers

METHOD = "steered_moe_4bit"

logger = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class ExpertsIn4bitConfig(BitsAndBytesConfig):
    """`BitsAndBytesConfig` in 4 bit, nf4 by default, for experts as well as for linear layers.

    Args:
        kwargs: As `BitsAndBytesConfig` takes them.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **kwargs})
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """For ``config.json``; without ``load_in_4bit``, by which transformers would take it for
        its own method."""
        return {k: v for k, v in super().to_dict().items() if "load_in" not in k}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The inverse of `to_dict`."""
        fields = {key: value for key, value in config_dict.items() if key != "quant_method"}
        return super().from_dict(fields, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def of(cls, config: BitsAndBytesConfig) -> ExpertsIn4bitConfig:
        """The same settings as those of a `BitsAndBytesConfig`.

        Raises:
            QuantizationError: 8 bit.
        """
        check_possible(config)
        return config if isinstance(config, cls) else cls.from_dict(_settings(config))


def config_for(
    asked: Any, load_in_4bit: bool, dtype: torch.dtype | str | None, present: Any
) -> Any:
    """The quantization config with which a base model is loaded.

    Args:
        asked: ``quantization_config`` of the caller; one of bitsandbytes becomes one for experts
            too, others are left as they are.
        load_in_4bit: nf4, computed in the dtype of the model.
        dtype: Of the model.
        present: ``quantization_config`` of the base's own config.

    Raises:
        QuantizationError: Both arguments, 8 bit, or a base that is quantized already.
    """
    if load_in_4bit and asked is not None:
        raise QuantizationError("give load_in_4bit=True or quantization_config, not both")
    if isinstance(asked, dict) and {"load_in_4bit", "load_in_8bit"} & set(asked):
        asked = BitsAndBytesConfig(**asked)
    if load_in_4bit:
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        asked = default_config(dtype or torch.bfloat16)
    if not isinstance(asked, BitsAndBytesConfig):
        return asked
    check_possible(asked, present)
    return ExpertsIn4bitConfig.of(asked)


def _settings(config: BitsAndBytesConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if "load_in" not in k}


class _Pack(ConversionOps):
    """Quantize one tensor of a checkpoint: packed experts, or bitsandbytes' own linear weight."""

    def __init__(self, quantizer: ExpertsIn4bitQuantizer) -> None:
        self.quantizer = quantizer
        self.linear = Bnb4BitHfQuantizer.get_quantize_ops(quantizer)

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """As transformers calls it, with a tensor by its name in the model."""
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            if name in self.quantizer.experts:
                tensor = value[0] if isinstance(value, list) else value
                result[name] = self.quantizer.pack(name, tensor)
            else:
                result |= self.linear.convert({name: value}, **kwargs)
        return result


@register_quantizer(METHOD)
class ExpertsIn4bitQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer, which also packs experts and never touches a router."""

    experts: dict[str, tuple[nn.Module, str]]
    states: dict[str, PackedExperts]

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a tensor becomes 4 bit while loading."""
        linear = super().param_needs_quantization(model, param_name, **kwargs)
        return param_name in self.experts or linear

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> None:
        asked = self.quantization_config.llm_int8_skip_modules
        self.experts = {
            f"{path}.{name}": (module, name)
            for path, module, name in expert_parameters(model)
            if should_convert_module(path, asked)
        }
        self.states = {}
        kept = self.get_modules_to_not_convert(model, asked, add_default_skips=True)
        self.quantization_config.llm_int8_skip_modules = sorted(
            {*kept, *(router.path for router in find_routers(model)), *_odd(model, device_map)}
        )
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        if self.pre_quantized:
            self._expect_packed()

    def _expect_packed(self) -> None:
        """Put empty packed experts in place, for a checkpoint that was saved packed."""
        config = self.quantization_config
        for module, name in self.experts.values():
            weights = getattr(module, name)
            experts, *shape = expert_shape(module, weights)
            with torch.device("meta"):
                nested = config.bnb_4bit_use_double_quant
                kind = config.bnb_4bit_quant_type
                state = PackedExperts(experts, tuple(shape), weights.dtype, kind, nested)
                data = torch.empty(experts, state.packed_size, dtype=torch.uint8)
            register(module, name, data, configured(state, weights.dim() == 2, config))
        self.experts = {}

    def pack(self, name: str, tensor: Tensor) -> Tensor:
        """Pack a weight of experts; what unpacks it is kept until all are loaded."""
        module, attribute = self.experts[name]
        packed = packed_of(module, attribute, self.quantization_config, tensor)
        self.states[name] = packed[1]
        return nn.Parameter(packed[0], requires_grad=False)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for name, (module, attribute) in self.experts.items():
            if name not in self.states:
                raise QuantizationError(f"the checkpoint lacks {name}, or it is offloaded")
            register(module, attribute, getattr(module, attribute).data, self.states.pop(name))
        self.experts = {}
        finish(model)
        done: PreTrainedModel = super()._process_model_after_weight_loading(model, **kwargs)
        return done

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        raise QuantizationError("4-bit experts cannot be turned back; load the base in 16 bit")

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls for each tensor that `param_needs_quantization`."""
        return _Pack(self)


def _odd(model: nn.Module, device_map: Any) -> list[str]:
    """Linear layers of a shape that bitsandbytes cannot pack on CPU, which it says in a warning."""
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if not devices & {"cpu", torch.device("cpu")}:
        return []
    found = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and (module.out_features % 32 or module.in_features % 64)
    ]
    if found:
        logger.warning(
            "on CPU bitsandbytes packs linear layers with out %% 32 == 0 and in %% 64 == 0 only; "
            "%d stay as they are: %s",
            len(found),
            ", ".join(found[:5]) + ", ..." * (len(found) > 5),
        )
    return found
