"""Every MoE language model of the installed transformers, and tiny random ones to test on.

The list of architectures is read from transformers itself. What is written down here is only what
a small configuration of each architecture needs beyond the values that all of them share.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXPERTS, TOP_K, LAYERS, HIDDEN, VOCAB = 8, 2, 4, 32, 128

# A configuration takes those of these values that are among its own fields.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "ngram_vocab_size_base": 1000,
    "hidden_size": HIDDEN,
    "hidden_size_per_layer_input": 0,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 3,
    "image_token_index": 3,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    # widths of the feed-forward parts
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "ffn_hidden_size": 48,
    "prefix_dense_intermediate_size": 48,
    "moe_intermediate_size": 24,
    "moe_hidden_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "share_expert_dim": 24,
    # experts and routing: groups and the factors are on wherever they exist
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "zero_expert_num": 4,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "route_scale": 1.5,
    "router_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "moe_router_logit_softcapping": 3.0,
    "use_expert_bias": True,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "router_hidden_size": 16,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "block_size": 16,
    "attention_chunk_size": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention and state space layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
}

_AS_MANY_KEYS_AS_QUERIES: dict[str, Any] = {"num_key_value_heads": 4}
_EVERY_SECOND_LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"] * 2}
_FIRST_LAYER_DENSE: dict[str, Any] = {
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}

# What an architecture needs on top of COMMON; these values need not be fields of the class.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _AS_MANY_KEYS_AS_QUERIES,
    "axk2": _AS_MANY_KEYS_AS_QUERIES | _FIRST_LAYER_DENSE,
    "bailing_hybrid": _AS_MANY_KEYS_AS_QUERIES | _EVERY_SECOND_LINEAR,
    "beam": _FIRST_LAYER_DENSE,
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 64,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    # A group counts as much as its best expert here, so the limit to fewer groups than experts
    # per token is the only one that ever changes a selection.
    "deepseek_v2": _AS_MANY_KEYS_AS_QUERIES
    | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    "deepseek_v3": _AS_MANY_KEYS_AS_QUERIES,
    "deepseek_v32": _AS_MANY_KEYS_AS_QUERIES | _FIRST_LAYER_DENSE,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dots1": _AS_MANY_KEYS_AS_QUERIES | {"n_shared_experts": 1},
    "dots3_note_text": _AS_MANY_KEYS_AS_QUERIES
    | _FIRST_LAYER_DENSE
    | {"layer_types": ["indexed_attention"] * LAYERS},  # the other kind has fixed, large widths
    "gemma4_text": {"enable_moe_block": True, "num_hidden_layers": 6},
    "glm4_moe_lite": _AS_MANY_KEYS_AS_QUERIES,
    "glm_moe_dsa": _AS_MANY_KEYS_AS_QUERIES | _FIRST_LAYER_DENSE,
    "granitemoehybrid": _EVERY_SECOND_LINEAR,
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4": _AS_MANY_KEYS_AS_QUERIES | _FIRST_LAYER_DENSE,
    "jamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": _AS_MANY_KEYS_AS_QUERIES | _EVERY_SECOND_LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": _AS_MANY_KEYS_AS_QUERIES,
    "minimax": _EVERY_SECOND_LINEAR,
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "expand": 2,
        "use_mamba_kernels": False,
    },
    "qwen3_next": _EVERY_SECOND_LINEAR,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# How the random values of a weight are drawn: the first pattern found in its name decides, as
# (mean, standard deviation). Weights of one dimension without a pattern keep their initial values.
_BIAS_OF_SELECTION = r"e_score_correction_bias|expert_bias|balancing_biases"
_DRAWN: dict[str, tuple[float, float]] = {
    _BIAS_OF_SELECTION: (0.0, 0.2),
    r"\.router\.bias$": (0.0, 0.2),
    r"per_expert_scale$|global_scale$": (1.0, 0.2),
}
_MATRICES: dict[str, tuple[float, float]] = {
    r"\.router\.proj\.": (0.0, 2.0),  # gemma4 makes its input as small as 1 / sqrt(hidden_size)
    r"\.(router|gate)\.": (0.0, 0.4),
    r"embed|wte": (0.0, 1.0),
    r"": (0.0, 0.2),
}


@cache
def moe_model_types() -> list[str]:
    """List the types of every MoE model that AutoModelForCausalLM builds, in order of name.

    A type counts when the file that defines its class records router logits or defines experts.
    Composite types are left out where the type of their text part is in the list as well.
    """
    found = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _has_experts(_source(name))]
    return sorted(name for name in found if _text_part(name) not in found)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Make a configuration of 4 to 6 narrow layers with 8 experts; `changes` have the last word."""
    config_class = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    common = {name: value for name, value in COMMON.items() if name in fields}
    return config_class(**common | OVERRIDES.get(model_type, {}) | changes)


def build(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Make a tiny model in eval mode whose weights and biases are random and depend on the seed.

    The same seed gives the same weights in every dtype, up to rounding. In half precision the
    model keeps in float32 what it also keeps when it is loaded from a checkpoint.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(model_type, **changes)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _keep_in_float32(model)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _source(model_type: str) -> ModuleType:
    """Return the modeling module that defines the causal language model of a type."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return sys.modules[model_class.__module__]


def _has_experts(source: ModuleType) -> bool:
    """Tell whether a modeling module defines a Mixture of Experts."""
    classes = [item for item in vars(source).values() if isinstance(item, type)]
    return any(_records_router(item) or _is_experts(item) for item in classes)


def _records_router(item: type) -> bool:
    """Tell whether a class is a model that says which modules give router logits."""
    recorded = getattr(item, "_can_record_outputs", None) or {}
    return issubclass(item, PreTrainedModel) and "router_logits" in recorded


def _is_experts(item: type) -> bool:
    """Tell whether a class holds experts; transformers before 5.19 record only some routers."""
    return issubclass(item, nn.Module) and item.__name__.endswith("Experts")


def _text_part(model_type: str) -> str | None:
    """Return the type of the text part of a composite configuration, None if there is none."""
    text_config = CONFIG_MAPPING[model_type].sub_configs.get("text_config")
    return getattr(text_config, "model_type", None)


def _keep_in_float32(model: PreTrainedModel) -> None:
    """Cast up, in place, what transformers loads in float32 into a model of half precision."""
    patterns = model._keep_in_fp32_modules_strict or ()
    for name, tensor in _tensors(model):
        is_half = tensor.dtype in (torch.bfloat16, torch.float16)
        if is_half and any(re.search(pattern, name) for pattern in patterns):
            tensor.data = tensor.data.float()


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw new values for everything that should be random, in place."""
    for name, tensor in _tensors(model):
        if name.endswith("tid2eid"):
            tensor.copy_(_expert_ids(tensor, generator))
        elif (drawn := _drawn(name, tensor)) is not None:
            mean, std = drawn
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer with its name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _drawn(name: str, tensor: Tensor) -> tuple[float, float] | None:
    """Return mean and standard deviation of a tensor's values, None if it keeps what it has."""
    is_matrix = isinstance(tensor, nn.Parameter) and tensor.ndim > 1
    patterns = _DRAWN | _MATRICES if is_matrix else _DRAWN
    return next((drawn for key, drawn in patterns.items() if re.search(key, name)), None)


def _expert_ids(table: Tensor, generator: torch.Generator) -> Tensor:
    """Draw different experts for each row of a table [vocabulary, k] from tokens to experts."""
    rows, top_k = table.shape
    return torch.rand(rows, EXPERTS, generator=generator).topk(top_k).indices
