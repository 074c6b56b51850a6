"""Every MoE causal LM that the installed transformers can build, on tiny random models.

What was selected, and with which weights, is read at the experts' door (`observe`), never from the
library under test. The scoring of each family is restated in float64 (`reference`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import transformers
from accelerate import disk_offload
from architectures import build, moe_model_types
from observe import observe, raw_logits
from packaging.version import Version
from reference import reference_routing
from torch import Tensor, nn

from steered_moe import RouterSteering, attach, find_routers
from steered_moe.collection import RoutingCollector
from steered_moe.errors import BaseModelError, InterventionError, RouterError
from steered_moe.routers import Router

VERSION = Version(transformers.__version__)
REFUSED = {"doge"}
NO_FORCE = {"aria_text"} if Version("5.19") > VERSION else set()  # it selected in its experts
NO_BFLOAT16 = {"deepseek_v4"} if Version("5.21") > VERSION else set()  # its own forward failed
TYPES = [name for name in moe_model_types() if name not in REFUSED]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INPUTS = {"input_ids": torch.randint(5, 120, (2, 9), generator=torch.Generator().manual_seed(0))}


@pytest.fixture(params=TYPES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return shared(request.param, torch.float32)


@pytest.fixture(params=[(name, kind) for name in TYPES for kind in DTYPES], ids="-".join)
def any_dtype(request: pytest.FixtureRequest) -> nn.Module:
    name, kind = request.param
    if kind == "bfloat16" and name in NO_BFLOAT16:
        pytest.skip("transformers' own forward fails in bfloat16")
    return shared(name, DTYPES[kind])


@cache
def shared(name: str, dtype: torch.dtype) -> nn.Module:
    return build(name, dtype=dtype)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(**INPUTS).logits


def forces(router: Router) -> Iterator[tuple[int, int]]:
    """Pairs of experts to force and to ban, over the whole range and across groups."""
    experts = router.num_experts
    for forced in (0, experts // 2 + 1, experts - 1):
        yield forced, (forced + 3) % experts


def steering_of(model: nn.Module, forced_expert: int = 1) -> RouterSteering:
    """Random weights for all layers; one expert forced, another one banned."""
    routers = find_routers(model)
    shape = (len(routers), routers[0].num_experts)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    forced = torch.zeros(shape, dtype=torch.int8)
    if model.config.model_type not in NO_FORCE:
        forced[:, forced_expert], forced[:, -1] = 1, -1
    return RouterSteering("s", [r.layer for r in routers], weights, forced)


def can_force(model: nn.Module) -> None:
    if model.config.model_type in NO_FORCE:
        pytest.skip("force is refused for this type under this transformers")


def test_the_list_comes_from_transformers_and_is_complete():
    assert len(TYPES) + len(REFUSED) == len(moe_model_types())
    if Version("5.23") <= VERSION:
        assert len(TYPES) >= 56
    assert {"qwen3_moe", "gpt_oss", "mixtral", "phimoe", "deepseek_v3", "olmoe"} <= set(TYPES)


def test_strength_zero_is_bit_identical(any_dtype: nn.Module):
    base = logits_of(any_dtype)
    handle = attach(any_dtype, steering_of(any_dtype), strength=0.0)
    try:
        assert torch.equal(logits_of(any_dtype), base)
        handle.strength = 1.0
        assert not torch.equal(logits_of(any_dtype), base)
    finally:
        handle.remove()
    assert torch.equal(logits_of(any_dtype), base)


def test_forced_is_always_selected_and_banned_never(any_dtype: nn.Module):
    can_force(any_dtype)
    free = observe(any_dtype, **INPUTS)
    missed = met = 0
    for router in find_routers(any_dtype):
        for forced, banned in forces(router):
            force = torch.zeros(1, router.num_experts, dtype=torch.int8)
            force[0, forced] = 1
            force[0, banned] = -1
            steering = RouterSteering("f", [router.layer], force * 0.0, force)
            handle = attach(any_dtype, steering)
            selected = observe(any_dtype, **INPUTS)[router.layer].selected
            handle.remove()
            assert selected[:, forced].all(), f"layer {router.layer}, expert {forced}"
            assert not selected[:, banned].any(), f"layer {router.layer}, expert {banned}"
            assert (selected.sum(dim=-1) == free[router.layer].selected.sum(dim=-1)).all()
            missed += not free[router.layer].selected[:, forced].all()
            met += bool(free[router.layer].selected[:, banned].any())
    assert missed, "without force these experts were selected for every token already"
    assert met, "without force these experts were never selected already"


def test_as_many_forced_as_top_k_are_the_whole_selection(model: nn.Module):
    can_force(model)
    router = find_routers(model)[-1]
    force = torch.zeros(1, router.num_experts, dtype=torch.int8)
    force[0, -router.top_k :] = 1
    handle = attach(model, RouterSteering("k", [router.layer], force * 0.0, force))
    selected = observe(model, **INPUTS)[router.layer].selected
    handle.remove()
    assert torch.equal(selected, (force > 0).expand_as(selected))
    left = torch.full_like(force, -1)
    left[0, : router.top_k] = 0
    handle = attach(model, RouterSteering("k", [router.layer], left * 0.0, left))
    selected = observe(model, **INPUTS)[router.layer].selected
    handle.remove()
    assert torch.equal(selected, (left == 0).expand_as(selected))
    force[0, 0] = 1
    with pytest.raises(BaseModelError, match=f"layer {router.layer}: {router.top_k + 1} experts"):
        attach(model, RouterSteering("k", [router.layer], force * 0.0, force))


def test_the_soft_edit_moves_the_selection_rate_of_its_expert(any_dtype: nn.Module):
    rates: dict[float, int] = {}
    handles = {}
    for router in find_routers(any_dtype):
        weights = torch.zeros(1, router.num_experts)
        weights[0, 2] = 1.0
        handles[router.layer] = attach(
            any_dtype, RouterSteering(f"layer{router.layer}", [router.layer], weights), 0.0
        )
    for layer, handle in handles.items():
        counts = []
        for strength in (-3.0, 0.0, 3.0):
            handle.strength = strength
            counts.append(int(observe(any_dtype, **INPUTS)[layer].selected[:, 2].sum()))
            rates[strength] = rates.get(strength, 0) + counts[-1]
        handle.strength = 0.0
        assert counts == sorted(counts), f"layer {layer}"
    for handle in handles.values():
        handle.remove()
    assert rates[-3.0] < rates[0.0] < rates[3.0]


def test_the_weights_equal_a_float64_reference_of_the_family(model: nn.Module):
    raw = raw_logits(model, **INPUTS)
    far = 0.0
    routers = find_routers(model)
    for router, expert in [(routers[0], 1), (routers[0], 6), (routers[-1], 1)]:
        steering = steering_of(model, expert).restrict([router.layer])
        handle = attach(model, steering)
        seen = observe(model, **INPUTS)[router.layer]
        handle.remove()
        force = torch.zeros(router.num_experts) if steering.force is None else steering.force[0]
        edited = edited_in_float64(raw[router.layer], steering.weights[0], force)
        selected, weights = reference_routing(model, router.layer, edited, force > 0, force < 0)
        assert torch.equal(seen.selected, selected)
        torch.testing.assert_close(seen.weights.double(), weights, atol=1e-5, rtol=1e-4)
        free = reference_routing(model, router.layer, raw[router.layer], force > 9, force > 9)[1]
        far = max(far, float((free - weights).abs().max()))
    assert far > 1e-3, "the check could not tell edited from unedited logits"


def edited_in_float64(logits: Tensor, weights: Tensor, force: Tensor) -> Tensor:
    """The edit of the design, restated: std of the selectable columns, then force."""
    z = logits.double().clone()
    routed = z[:, : len(weights)]
    spread = ((routed - routed.mean(1, True)) ** 2).mean(1, True).sqrt()
    routed = routed + weights.double() * spread
    highest, lowest = routed.max(1, True).values, routed.min(1, True).values
    routed = torch.where(force > 0, highest, torch.where(force < 0, lowest - 1.0, routed))
    z[:, : len(weights)] = routed
    return z


# What some models record as router logits is something else: back to logits.
RECORDED = {
    "gemma4_text": torch.log,  # softmax
    "laguna": lambda capped: 3.0 * torch.atanh(capped / 3.0),
    "inkling_text": lambda routed: torch.nn.functional.pad(routed, (0, 2)),  # shared experts
}


def test_profiled_counts_equal_those_from_output_router_logits(model: nn.Module):
    kind, routers = model.config.model_type, find_routers(model)
    collector = RoutingCollector(model)
    mask = torch.ones_like(INPUTS["input_ids"])
    mask[0, :4] = 0
    with collector.batch(mask), torch.no_grad():
        recorded = model(**INPUTS, output_router_logits=True).router_logits
    if kind == "jetmoe":
        recorded = recorded[2::3]  # the other two route attention
    counts = collector.profile("en").counts[0]
    assert len(recorded) == len(routers)
    for row, (router, logits) in enumerate(zip(routers, recorded, strict=True)):
        logits = RECORDED.get(kind, lambda same: same)(logits.double().flatten(0, -2))
        never = torch.zeros(router.num_experts, dtype=torch.bool)
        selected, _ = reference_routing(model, router.layer, logits, never, never)
        expected = selected[mask.flatten().bool()].double().sum(dim=0)[: counts.shape[1]]
        assert torch.equal(counts[row], expected)
        everything = selected.double().sum(dim=0)[: counts.shape[1]]
        assert not torch.equal(counts[row], everything), "padding would have been counted"


def test_every_experts_implementation_gives_the_same(model: nn.Module):
    before = model.config._experts_implementation
    handle = attach(model, steering_of(model))
    reached = {}
    try:
        for name in ("eager", "grouped_mm", "batched_mm"):
            try:
                model.set_experts_implementation(name)
            except ValueError:
                continue
            reached[name] = logits_of(model)
    finally:
        model.set_experts_implementation(before)
        handle.remove()
    first = next(iter(reached.values()))
    for other in reached.values():
        torch.testing.assert_close(other, first, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", TYPES)
def test_offload_to_disk_gives_the_same_logits(name: str, tmp_path: Path):
    resident, offloaded = shared(name, torch.float32), build(name)
    base = logits_of(resident)
    disk_offload(offloaded, str(tmp_path), execution_device="cpu")
    assert any(p.is_meta for r in find_routers(offloaded) for p in r.module.parameters())
    try:
        same = torch.allclose(logits_of(offloaded), base, atol=1e-4)
    except (RuntimeError, NotImplementedError):
        same = False
    if not same:
        pytest.skip("the unsteered model itself does not run right when it is offloaded")
    handles = [attach(model, steering_of(model)) for model in (resident, offloaded)]
    steered = logits_of(resident)
    handles[0].remove()
    torch.testing.assert_close(logits_of(offloaded), steered, atol=1e-4, rtol=1e-4)
    assert (steered - base).abs().max() > 1e-3
    handles[1].remove()
    torch.testing.assert_close(logits_of(offloaded), base, atol=1e-4, rtol=1e-4)


def test_compile_adds_no_graph_and_no_recompile(model: nn.Module):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    try:
        base = compiled_logits(model, graphs)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"the base model itself does not compile to one graph: {type(error).__name__}")
    assert graphs.frame_count == 1
    torch._dynamo.reset()
    handle = attach(model, steering_of(model))
    steered = torch._dynamo.testing.CompileCounter()
    try:
        for strength in (1.0, 0.0, -0.5):
            handle.strength = strength
            seen = compiled_logits(model, steered)
            torch.testing.assert_close(seen, logits_of(model), atol=1e-4, rtol=1e-4)
            assert torch.allclose(seen, base, atol=1e-4) == (strength == 0.0)
    finally:
        handle.remove()
    assert steered.frame_count == 1


def compiled_logits(model: nn.Module, graphs: torch._dynamo.testing.CompileCounter) -> Tensor:
    with torch.no_grad():
        return torch.compile(model, backend=graphs, fullgraph=True)(**INPUTS).logits


def test_a_router_that_is_bypassed_is_an_error(model: nn.Module):
    last = find_routers(model)[-1]
    handle = attach(model, steering_of(model))
    last.module.forward = type(last.module).forward.__get__(last.module)
    try:
        with pytest.raises(InterventionError, match=last.path.replace(".", r"\.")):
            logits_of(model)
    finally:
        handle.remove()
    handle = attach(model, steering_of(model))
    logits_of(model)  # not bypassed: no error
    handle.remove()


@pytest.mark.skipif("doge" not in moe_model_types(), reason="no doge in this transformers")
def test_doge_is_refused_by_name_and_reason():
    with pytest.raises(RouterError, match=r"DogeForCausalLM cannot be steered.*product keys"):
        find_routers(build("doge"))


@pytest.mark.skipif("deepseek_v4" not in TYPES, reason="no deepseek_v4 in this transformers")
def test_hash_routed_layers_are_refused_by_name_and_reason():
    model = shared("deepseek_v4", torch.float32)
    layers = {router.layer for router in find_routers(model)}
    hashed = min(set(range(len(model.model.layers))) - layers)
    with pytest.raises(BaseModelError, match=rf"layer {hashed} .*token id"):
        attach(model, RouterSteering("h", [hashed], torch.ones(1, 8)))
