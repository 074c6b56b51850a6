"""4 bit that is really 4 bit: every MoE of transformers, tiny, and the embedded model."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from conftest import ROOT
from observe import observe
from safetensors.torch import load_file, save_file
from test_architectures import INPUTS, NO_BFLOAT16, NO_FORCE, TYPES, logits_of, steering_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from steered_moe import RouterSteering, SteeredMoEForCausalLM, attach, find_routers
from steered_moe.errors import QuantizationError, RouterError
from steered_moe.memory import memory_by_part
from steered_moe.packed_experts import PackedExperts
from steered_moe.quantization import expert_parameters, expert_shape, quantize_experts_
from steered_moe.quantizer import ExpertsIn4bitConfig

FOLDER = ROOT / "examples" / "tiny_multilingual_moe"
ONE = {"input_ids": torch.tensor([[7]])}


@cache
def original(name: str) -> PreTrainedModel:
    return build(name, dtype=torch.bfloat16)


@cache
def quantized(name: str) -> PreTrainedModel:
    return quantize_experts_(copy.deepcopy(original(name)))


def has_choice(model: PreTrainedModel) -> bool:
    """Whether transformers lets the experts implementation be chosen; 52 of 56 types in 5.23."""
    return any(hasattr(module, "has_gate") for module in model.modules())


@pytest.fixture(params=[name for name in TYPES if name not in NO_BFLOAT16])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def by_bitsandbytes(expert: Tensor, nested: bool = False, kind: str = "nf4") -> Tensor:
    """One expert's weights through bitsandbytes and back, in one row."""
    packed, state = bnb.quantize_4bit(
        expert.reshape(-1), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    return bnb.dequantize_4bit(packed, state).view(expert.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 48, 32), (5, 7, 9), (3, 256, 128), (2, 1, 3)])
def test_packed_experts_are_those_of_bitsandbytes(shape, dtype, kind: str, nested: bool):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = PackedExperts.pack(weights, kind, nested)
    expected = torch.stack([by_bitsandbytes(expert, nested, kind) for expert in weights])
    assert torch.equal(state(packed), expected)
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(state.pick(packed, rows, dtype), expected[rows])
    other = torch.stack(
        [by_bitsandbytes(e, nested, "nf4" if kind == "fp4" else "fp4") for e in weights]
    )
    assert not torch.equal(state(packed), other)


def test_scales_survive_a_cast():
    packed, state = PackedExperts.pack(torch.randn(4, 64, 64), nested=True)
    before = state(packed)
    assert torch.equal(state.half()(packed), before)


def test_every_expert_weight_is_in_4_bit(name: str):
    before = {f"{path}.{n}": (m, n) for path, m, n in expert_parameters(original(name))}
    model = quantized(name)
    assert before
    assert not list(expert_parameters(model))
    for key, (module, attribute) in before.items():
        path, _, attribute = key.rpartition(".")
        weights = getattr(module, attribute).detach()
        stacked = weights.view(expert_shape(module, weights))
        expected = torch.stack([by_bitsandbytes(expert) for expert in stacked])
        found = getattr(model.get_submodule(path), attribute)
        assert found.shape == weights.shape
        assert torch.equal(found.view(expected.shape), expected)
    part = memory_by_part(model)["experts"]
    assert part.half == sum(2 * getattr(m, n).numel() for m, n in before.values())
    assert part.bytes <= 0.30 * part.half
    assert memory_by_part(original(name))["experts"].half == 0


def dequantized(name: str) -> PreTrainedModel:
    """The same weights in bfloat16."""
    model = copy.deepcopy(original(name))
    for path, module, attribute in expert_parameters(model):
        weights = getattr(quantized(name).get_submodule(path), attribute)
        getattr(module, attribute).data.copy_(weights)
    return model


def test_unpacking_few_experts_equals_unpacking_all(name: str, monkeypatch: pytest.MonkeyPatch):
    picked: list[int] = []
    pick = PackedExperts.pick

    def counted(self: PackedExperts, packed: Tensor, experts: Any, dtype: torch.dtype) -> Tensor:
        picked.append(len(packed[experts]))
        return pick(self, packed, experts, dtype)

    monkeypatch.setattr(PackedExperts, "pick", counted)
    whole, model = dequantized(name), quantized(name)
    with torch.no_grad():
        few = model(**ONE).logits
        if has_choice(model):
            top_k = find_routers(model)[0].top_k
            assert min(picked) <= top_k < 8, "more experts were unpacked than were chosen"
            whole.set_experts_implementation("batched_mm")
        assert torch.equal(few, whole(**ONE).logits)
        if has_choice(model):
            whole.set_experts_implementation("grouped_mm")
        assert torch.equal(model(**INPUTS).logits, whole(**INPUTS).logits)
        assert not torch.equal(few, original(name)(**ONE).logits)


def test_strength_zero_is_the_unsteered_quantized_model(name: str):
    model = quantized(name)
    base = logits_of(model)
    handle = attach(model, steering_of(model), strength=0.0)
    try:
        assert torch.equal(logits_of(model), base)
        handle.strength = 1.0
        assert not torch.equal(logits_of(model), base)
    finally:
        handle.remove()
    assert torch.equal(logits_of(model), base)


def test_forced_banned_and_soft_steering_on_quantized_models(name: str):
    model = quantized(name)
    free = observe(model, **INPUTS)
    moved = 0
    for router in find_routers(model):
        soft = torch.zeros(1, router.num_experts)
        soft[0, 2] = 3.0
        seen = seen_with(model, RouterSteering("soft", [router.layer], soft))
        moved += int(seen[:, 2].sum()) - int(free[router.layer].selected[:, 2].sum())
        if name in NO_FORCE:
            continue
        force = torch.zeros(1, router.num_experts, dtype=torch.int8)
        force[0, -1], force[0, 0] = 1, -1
        seen = seen_with(model, RouterSteering("hard", [router.layer], 0 * soft, force))
        assert seen[:, router.num_experts - 1].all()
        assert not seen[:, 0].any()
    assert moved > 0


def seen_with(model: PreTrainedModel, steering: RouterSteering) -> Tensor:
    """Which experts each token gets in the steered layer."""
    handle = attach(model, steering)
    seen = observe(model, **INPUTS)[int(steering.layers[0])].selected
    handle.remove()
    return seen


def save(name: str, folder: Path) -> Path:
    original(name).save_pretrained(folder)
    return folder


def all_linear(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if type(module) is nn.Linear]


def test_quantized_while_loading_and_reloaded(name: str, tmp_path: Path):
    config = ExpertsIn4bitConfig(
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=all_linear(original(name))
    )
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    folder = save(name, tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    after = quantize_experts_(AutoModelForCausalLM.from_pretrained(folder, **options))
    assert torch.equal(logits_of(loaded), logits_of(after))
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options)
    assert torch.equal(logits_of(again), logits_of(loaded))
    assert memory_by_part(again) == memory_by_part(loaded)
    assert memory_by_part(again)["experts"].bytes


# Families whose router has a linear layer.
LINEAR_ROUTERS = (
    "afmoe",
    "dbrx",
    "gemma4_text",
    "hunyuan_v1_moe",
    "jetmoe",
    "longcat_flash",
    "zaya",
)


def linear_of(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("name", LINEAR_ROUTERS)
def test_routers_embeddings_and_head_are_never_quantized(name: str, tmp_path: Path, caplog):
    if name not in TYPES:
        pytest.skip("not in this transformers")
    folder = save(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ExpertsIn4bitConfig(), dtype=torch.bfloat16
    )
    paths = [router.path for router in find_routers(model)]
    assert paths
    for path in paths:
        router = model.get_submodule(path)
        assert not any(isinstance(part, Linear4bit) for part in router.modules())
        assert all(weight.is_floating_point() for weight in router.parameters())
    assert not isinstance(model.get_output_embeddings(), Linear4bit)
    assert model.get_input_embeddings().weight.is_floating_point()
    assert "on CPU bitsandbytes packs linear layers with" in caplog.text


def embedded(**options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.bfloat16, **options)


@pytest.fixture(scope="module")
def steered() -> SteeredMoEForCausalLM:
    return SteeredMoEForCausalLM.from_pretrained(FOLDER / "steered", load_in_4bit=True)


def test_plain_bitsandbytes_leaves_experts_in_16_bit_and_takes_routers(tmp_path: Path):
    """Twin: what this library is needed for."""
    plain = embedded(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    parts = memory_by_part(plain)
    assert parts["experts"].half == 0
    assert parts["unquantized"].half > 10 * parts["linear"].half
    name = "hunyuan_v1_moe"
    build(name, dtype=torch.bfloat16, hidden_size=64, num_experts=32).save_pretrained(tmp_path)
    skip = [path for path in all_linear(original(name)) if "gate.wg" not in path]
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(RouterError, match=r"mlp.gate' is quantized"):
        find_routers(model)
    config = ExpertsIn4bitConfig(llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert not linear_of(model)


def test_load_in_4bit_steers_and_says_what_it_weighs(steered, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "steered_moe"):
        model = SteeredMoEForCausalLM.from_pretrained(FOLDER / "steered", load_in_4bit=True)
    assert "4 bit: experts 9,437,184 -> 2,654,208 bytes; linear 786,432 -> 221,184" in caplog.text
    assert "stays in" not in caplog.text
    assert len(linear_of(model)) == 32  # four of attention in each layer
    assert model.steering == RouterSteering.load(FOLDER / "steered")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), model.unsteered():
        base = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base)
        plain = AutoModelForCausalLM.from_pretrained(
            FOLDER / "base",
            quantization_config=ExpertsIn4bitConfig(bnb_4bit_compute_dtype="bfloat16"),
        )
        assert torch.equal(plain(ids).logits, base)


def test_what_is_large_and_stays_in_16_bit_is_named(tmp_path: Path, caplog):
    quantize_experts_(embedded())
    said = "model.layers.0.self_attn.q_proj.weight (128, 128) and 7 like it stay in torch.bfloat16"
    assert said in caplog.text
    assert "embed_tokens" not in caplog.text


def test_the_error_is_that_of_linear4bit_on_unfused_experts():
    model = embedded()
    experts = model.model.layers[3].mlp.experts
    packed = quantize_experts_(copy.deepcopy(model)).model.layers[3].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 128, generator=generator).bfloat16()
    for index in (0, 5):
        weight = experts.gate_up_proj[index].detach()
        rows, columns = weight.shape
        linear = Linear4bit(columns, rows, False, torch.bfloat16, False, "nf4")
        linear.weight.data = weight.clone()
        linear = linear.to("cpu")  # quantizes
        exact = hidden.float() @ weight.float().T
        with torch.no_grad():
            theirs = (linear(hidden) - exact).float().norm() / exact.norm()
        ours = ((hidden @ packed.gate_up_proj[index].T) - exact).float().norm() / exact.norm()
        assert 0.01 < ours < 0.2
        assert ours <= 1.01 * theirs  # bfloat16 rounding of the product, nothing else


def test_double_quantization_fp4_and_compute_dtype_reach_the_experts():
    def of(**options: Any) -> PreTrainedModel:
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        return SteeredMoEForCausalLM.from_pretrained(FOLDER / "steered", quantization_config=config)

    nested = of(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    state = nested.model.layers[0].mlp.experts.parametrizations.down_proj[0]
    assert (state.nested, state.quant_type, state.compute_dtype) == (True, "nf4", torch.float32)
    single = of(bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16)
    state = single.model.layers[0].mlp.experts.parametrizations.down_proj[0]
    assert (state.nested, state.quant_type, state.compute_dtype) == (False, "fp4", torch.bfloat16)
    sizes = [memory_by_part(model)["experts"].bytes for model in (nested, single)]
    assert sizes[0] < sizes[1]
    seen: list[torch.dtype] = []
    hook: Callable[..., None] = lambda m, i, o: seen.append(o.dtype)  # noqa: E731
    act = nested.model.layers[0].mlp.experts.act_fn.register_forward_hook(hook)
    with torch.no_grad():
        output = nested(torch.tensor([[5]])).logits
    act.remove()
    assert seen == [torch.float32]
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"])
def test_compiled_gives_the_same(kind: str):
    model = quantized(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=kind != "nemotron_h", backend="aot_eager")
    with torch.no_grad():
        for inputs in (ONE, INPUTS):
            torch.testing.assert_close(
                compiled(**inputs).logits, model(**inputs).logits, atol=2e-2, rtol=2e-2
            )


def test_generate_and_moving_work(steered):
    ids = torch.arange(5, 15)[None]
    first = steered.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(steered.to("cpu").generate(ids, max_new_tokens=4, do_sample=False), first)
    assert torch.equal(
        copy.deepcopy(steered).generate(ids, max_new_tokens=4, do_sample=False), first
    )


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("8 bit", lambda: load(BitsAndBytesConfig(load_in_8bit=True)), "8 bit would leave"),
    ("8 bit as a dict", lambda: load({"load_in_8bit": True}), "8 bit would leave"),
    ("both", lambda: load(BitsAndBytesConfig(load_in_4bit=True), load_in_4bit=True), "not both"),
    ("twice", lambda: quantize_experts_(quantized("qwen3_moe")), "is quantized already"),
    ("8 bit as an argument", lambda: load(None, load_in_8bit=True), "load_in_8bit: put it into"),
    ("loose", lambda: load(None, load_in_4bit=True, bnb_4bit_quant_type="fp4"), "put it into"),
    ("eager", lambda: load(None, load_in_4bit=True, experts_implementation="eager"), "their own"),
    ("dequantize", lambda: load(None, load_in_4bit=True).dequantize(), "cannot be turned back"),
    ("offloaded", lambda: quantize_experts_(on_meta()), "is offloaded; quantize a model that is"),
]  # fmt: skip


def load(config: Any, **options: Any) -> Any:
    return SteeredMoEForCausalLM.from_pretrained(
        FOLDER / "steered", quantization_config=config, **options
    )


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(original("qwen3_moe").config)


@pytest.mark.parametrize(("act", "says"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_cannot_be_is_refused(act: Callable[[], Any], says: str):
    with pytest.raises(QuantizationError, match=says):
        act()


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "awq"])
def test_a_base_that_is_quantized_already_is_refused(tiny: Path, tmp_path: Path, method: str):
    shutil.copytree(tiny, tmp_path / "repo")
    path = tmp_path / "repo" / "base" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(config))
    with pytest.raises(QuantizationError, match=rf"is quantized already \({method}\)"):
        SteeredMoEForCausalLM.from_pretrained(tmp_path / "repo" / "steered", load_in_4bit=True)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    absent = lambda name, *a: None if name == "bitsandbytes" else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(QuantizationError, match=r"pip install 'steered-moe\[quantization\]'"):
        SteeredMoEForCausalLM.from_pretrained(FOLDER / "steered", load_in_4bit=True)


def test_a_dense_model_has_nothing_to_quantize():
    small = LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    with pytest.raises(ValueError, match="has no router: it is a dense model"):
        quantize_experts_(LlamaForCausalLM(small))


def test_a_quantized_base_is_saved_loaded_and_steered(tmp_path: Path, steered):
    base = AutoModelForCausalLM.from_pretrained(
        FOLDER / "base", quantization_config=ExpertsIn4bitConfig(bnb_4bit_compute_dtype="bfloat16")
    )
    base.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.4 * 10_876_552
    again = SteeredMoEForCausalLM.from_pretrained(FOLDER / "steered", base_model=tmp_path)
    assert torch.equal(logits_of(again), logits_of(steered))
    assert isinstance(
        again.model.layers[0].mlp.experts.parametrizations.down_proj[0], PackedExperts
    )
    assert parametrize.is_parametrized(again.model.layers[0].mlp.experts)


@pytest.mark.parametrize("kind", ["qwen3_moe", "jetmoe", "gpt_oss"])
def test_experts_quantized_after_loading_are_saved_and_loaded_too(kind: str, tmp_path: Path):
    model = quantize_experts_(copy.deepcopy(original(kind)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits_of(again), logits_of(model))
    assert memory_by_part(again) == memory_by_part(model)


def test_experts_that_are_to_be_skipped_are_skipped():
    skip = ["model.layers.0.mlp.experts", "lm_head"]
    model = embedded(quantization_config=ExpertsIn4bitConfig(llm_int8_skip_modules=skip))
    left = {path for path, _, _ in expert_parameters(model)}
    assert left == {"model.layers.0.mlp.experts"}
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_it_computes_in_the_dtype_of_the_model(dtype: Any):
    model = load(None, load_in_4bit=True, dtype=dtype)
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.float32
    assert load(None, load_in_4bit=True).config.quantization_config.bnb_4bit_compute_dtype == (
        torch.bfloat16
    )


def test_a_checkpoint_without_some_experts_is_refused(tmp_path: Path):
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if "layers.2.mlp.experts" not in k}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"lacks model\.layers\.2\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=ExpertsIn4bitConfig()
        )
