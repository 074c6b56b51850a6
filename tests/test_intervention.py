"""Attaching: strengths, rows of a batch, several steerings, compile, offload, refusals."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch._dynamo
from architectures import build
from observe import observe, raw_logits
from torch import Tensor, nn
from transformers import CompileConfig

from steered_moe import RouterSteering, attach, find_routers
from steered_moe.errors import BaseModelError, InterventionError, RouterError, SteeringError
from steered_moe.intervention import attached
from steered_moe.recording import record_selections

EXPERTS = 8
IDS = torch.randint(5, 120, (2, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.randn(2, EXPERTS, generator=torch.Generator().manual_seed(1))
FORCE = torch.zeros(2, EXPERTS, dtype=torch.int8)
FORCE[:, 3], FORCE[:, 6] = 1, -1
STEERING = RouterSteering("s", [1, 2], WEIGHTS, FORCE)


@pytest.fixture
def model() -> nn.Module:
    return build("qwen3_moe")


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


def test_only_layers_with_a_row_are_touched(model: nn.Module):
    empty = RouterSteering("e", [0, 1], torch.stack([torch.zeros(EXPERTS), WEIGHTS[0]]))
    attach(model, empty)
    touched = [r.layer for r in find_routers(model) if "forward" in r.module.__dict__]
    assert touched == [1]
    buffers = dict(model.named_buffers())
    assert [name for name in buffers if "steering" in name] == [
        "model.layers.1.mlp.gate.steering_std"
    ]
    assert not any("steering" in name for name in model.state_dict())


def test_removing_gives_the_model_back(model: nn.Module):
    base, before = logits_of(model), set(dict(model.named_buffers()))
    handle = attach(model, STEERING)
    assert not torch.equal(logits_of(model), base)
    assert attached(model).buffer_bytes == 2 * EXPERTS * (4 + 1)
    handle.remove()
    assert torch.equal(logits_of(model), base)
    assert attached(model) is None
    assert set(dict(model.named_buffers())) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    for use in (handle.remove, lambda: handle.strength):
        with pytest.raises(SteeringError, match="no steering named 's' is attached; there is none"):
            use()


def test_strength_multiplies_the_soft_part(model: nn.Module):
    soft = RouterSteering("s", [1, 2], WEIGHTS)
    handle = attach(model, soft, strength=-0.7)
    one = logits_of(model)
    handle.remove()
    attach(model, -0.7 * soft)
    torch.testing.assert_close(logits_of(model), one, atol=1e-6, rtol=1e-6)


def test_strength_is_changed_in_place(model: nn.Module):
    handle = attach(model, STEERING)
    gate = model.model.layers[1].mlp.gate
    where = {name: getattr(gate, name).data_ptr() for name in ("steering_std", "steering_force")}
    hooks = (len(model._forward_hooks), len(gate._forward_hooks), gate.forward)
    for strength in (0.0, -3.0, 2.0):
        handle.strength = strength
        torch.testing.assert_close(gate.steering_std[0], strength * WEIGHTS[0])
    assert where == {name: getattr(gate, name).data_ptr() for name in where}
    assert hooks == (len(model._forward_hooks), len(gate._forward_hooks), gate.forward)


def test_force_acts_wherever_strength_is_not_zero(model: nn.Module):
    handle = attach(model, STEERING, strength=-1.0)
    assert observe(model, input_ids=IDS)[1].selected[:, 3].all()
    handle.strength = 0.0
    assert not observe(model, input_ids=IDS)[1].selected[:, 3].all()


def test_contexts_restore_the_strength_even_after_an_error(model: nn.Module):
    base = logits_of(model)
    handle = attach(model, STEERING, strength=0.5)
    half = logits_of(model)
    with handle.unsteered():
        assert torch.equal(logits_of(model), base)
    with pytest.raises(KeyError), handle.steered(2.0):
        raise KeyError(handle.strength)
    assert handle.strength == 0.5
    assert torch.equal(logits_of(model), half)


def test_rows_of_a_batch_have_their_own_strength(model: nn.Module):
    model.set_experts_implementation("batched_mm")  # computes each token on its own
    base = logits_of(model)
    handle = attach(model, STEERING)
    full = logits_of(model)
    handle.strength = [1.0, 0.0]
    mixed = logits_of(model)
    torch.testing.assert_close(mixed[0], full[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[1], base[1])
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)
    assert handle.strength.tolist() == [1.0, 0.0]
    handle.strength = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(logits_of(model)[1], full[1], atol=1e-5, rtol=1e-5)


def test_rows_can_be_given_when_attaching(model: nn.Module):
    handle = attach(model, STEERING)
    handle.strength = [1.0, -0.5]
    expected = logits_of(model)
    handle.remove()
    attach(model, STEERING, [1.0, -0.5])
    assert torch.equal(logits_of(model), expected)
    attach(model, RouterSteering("more", [3], WEIGHTS[:1]), torch.tensor([0.0, 2.0]))
    assert not torch.equal(logits_of(model), expected)


def test_rows_that_do_not_fit_the_batch_are_an_error(model: nn.Module):
    handle = attach(model, STEERING)
    handle.strength = [1.0, 0.0]
    for call in (model.forward, model.model):  # as PEFT does, and as encoders of text do
        with pytest.raises(SteeringError, match="2 rows but the batch has 1"):
            call(input_ids=IDS[:1])
    assert logits_of(model, IDS.repeat(2, 1)).shape[0] == 4  # as beams repeat prompts
    for batch in (IDS[:1], IDS.repeat(2, 1)[:3]):
        with pytest.raises(SteeringError, match=f"2 rows but the batch has {len(batch)}"):
            logits_of(model, batch)
    handle.strength = 1.0
    logits_of(model, IDS[:1])


@pytest.mark.parametrize(
    "strength", [float("nan"), [], [[1.0]], "much", [1.0, float("inf")], None, {}, True]
)
def test_bad_strengths_are_refused_and_change_nothing(model: nn.Module, strength):
    handle = attach(model, STEERING, strength=0.5)
    half = logits_of(model)
    with pytest.raises(SteeringError, match="strength"):
        handle.strength = strength
    assert handle.strength == 0.5
    assert torch.equal(logits_of(model), half)


def test_several_steerings_add_up(model: nn.Module):
    first, second = (RouterSteering(n, [1, 2], WEIGHTS[i].repeat(2, 1)) for i, n in enumerate("ab"))
    attach(model, first, 0.5)
    handle = attach(model, second, 2.0)
    both = logits_of(model)
    attached(model).remove("a")
    attached(model).remove("b")
    attach(model, 0.5 * first + 2.0 * second)
    torch.testing.assert_close(logits_of(model), both, atol=1e-6, rtol=1e-6)
    assert handle.name == "b"


def test_steerings_of_different_scales_add_up(model: nn.Module):
    raw = raw_logits(model, input_ids=IDS)[1]
    attach(model, RouterSteering("a", [1], WEIGHTS[:1], scale="abs"), 0.5)
    attach(model, RouterSteering("b", [1], WEIGHTS[1:], scale="none"), -2.0)
    with torch.no_grad():
        seen = model(input_ids=IDS, output_router_logits=True).router_logits[1]
    expected = raw + 0.5 * WEIGHTS[0] * raw.abs() - 2.0 * WEIGHTS[1]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


def test_steerings_that_contradict_each_other_are_refused(model: nn.Module):
    attach(model, STEERING)
    with pytest.raises(SteeringError, match="named 's' is attached already"):
        attach(model, STEERING)
    opposite = RouterSteering("o", [2], WEIGHTS[:1], -FORCE[:1])
    with pytest.raises(SteeringError, match="layer 2, expert 3 is forced by one"):
        attach(model, opposite)
    assert list(attached(model).steerings) == ["s"]
    handle = attach(model, opposite, strength=0.0)
    with pytest.raises(SteeringError, match="layer 2, expert 3"):
        handle.strength = 1.0
    more = torch.zeros(1, EXPERTS, dtype=torch.int8)
    more[0, :2] = 1
    with pytest.raises(BaseModelError, match="layer 1: 3 experts are forced"):
        attach(model, RouterSteering("m", [1], WEIGHTS[:1], more))
    with pytest.raises(SteeringError, match="strengths of"):
        attached(model).set_strengths({"s": [1.0, 0.0], "o": [0.0, 0.0, 0.0]})


def test_a_copy_has_its_own_strength(model: nn.Module):
    base = logits_of(model)
    attach(model, STEERING)
    copy = deepcopy(model)
    steered = logits_of(model)
    attached(copy).set_strengths({"s": 0.0})
    assert torch.equal(logits_of(copy), base)
    assert torch.equal(logits_of(model), steered)
    attached(model).remove("s")
    attached(copy).set_strengths({"s": 1.0})
    assert torch.equal(logits_of(copy), steered)


def test_generate_with_a_static_cache_is_compiled_once(model: nn.Module):
    def generate() -> Tensor:
        return model.generate(
            IDS, max_new_tokens=8, do_sample=False, cache_implementation="static",
            compile_config=config,
        )  # fmt: skip

    plain = model.generate(IDS, max_new_tokens=8, do_sample=False)
    handle = attach(model, STEERING, 2.0)
    steered = model.generate(IDS, max_new_tokens=8, do_sample=False)
    torch._dynamo.reset()
    graphs: list[Tensor] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(inputs[0])
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    assert torch.equal(generate(), steered)
    handle.strength = 0.0
    assert torch.equal(generate(), plain)
    assert not torch.equal(plain, steered)
    assert len(graphs) == 1


def test_offload_to_disk_gives_the_same_logits(model: nn.Module, tmp_path):
    model.save_pretrained(tmp_path / "base")
    reload = type(model).from_pretrained
    layers = {f"model.layers.{i}": "cpu" for i in (0, 2, 3)}
    device_map = layers | {
        "model.layers.1": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    offloaded = reload(
        tmp_path / "base", device_map=device_map, offload_folder=str(tmp_path / "disk")
    )
    resident = reload(tmp_path / "base")
    assert next(offloaded.model.layers[1].parameters()).is_meta
    base = logits_of(resident)
    for one in (offloaded, resident):
        attach(one, STEERING)
    assert torch.equal(logits_of(offloaded), logits_of(resident))
    assert not torch.allclose(logits_of(offloaded), base, atol=1e-3)
    attached(offloaded).remove("s")
    assert torch.equal(logits_of(offloaded), base)


def test_offloading_after_attaching_and_removing_gives_the_base(model: nn.Module, tmp_path):
    from accelerate import disk_offload

    base = logits_of(model)
    handle = attach(model, STEERING)
    steered = logits_of(model)
    disk_offload(model, str(tmp_path), execution_device="cpu")
    torch.testing.assert_close(logits_of(model), steered, atol=1e-5, rtol=1e-5)
    handle.remove()
    torch.testing.assert_close(logits_of(model), base, atol=1e-5, rtol=1e-5)
    attach(model, STEERING)
    torch.testing.assert_close(logits_of(model), steered, atol=1e-5, rtol=1e-5)


def test_an_empty_steering_is_attached_too(model: nn.Module):
    empty = attach(model, RouterSteering("empty", [1], torch.zeros(1, EXPERTS)))
    assert list(attached(model).steerings) == ["empty"]
    attach(model, STEERING)
    steered = logits_of(model)
    empty.remove()
    assert list(attached(model).steerings) == ["s"]
    assert torch.equal(logits_of(model), steered)


def test_parts_of_a_model_are_not_steered_twice(model: nn.Module):
    inner = attach(model.model, STEERING)
    steered = logits_of(model)
    with pytest.raises(SteeringError, match="steered already, through another model object"):
        attach(model, RouterSteering("other", [2], WEIGHTS[:1]))
    assert torch.equal(logits_of(model), steered)
    inner.remove()
    attach(model, RouterSteering("other", [2], WEIGHTS[:1]))


def test_recording_while_steering_comes_on_leaves_nothing_behind(model: nn.Module):
    with record_selections(model) as selections:
        attach(model, STEERING)
        logits_of(model)
        steered = logits_of(model)
    passes = {layer: len(found) for layer, found in selections.items()}
    assert torch.equal(logits_of(model), steered)
    assert {layer: len(found) for layer, found in selections.items()} == passes
    attached(model).remove("s")
    assert not torch.equal(logits_of(model), steered)


def test_inference_mode_leaves_buffers_that_can_change_later(model: nn.Module):
    with torch.inference_mode():
        handle = attach(model, STEERING, torch.ones(1))
        handle.strength = [0.0, 1.0]
    handle.strength = [1.0, 0.0]
    model(input_ids=IDS).logits.sum().backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_a_compiled_model_can_be_steered(model: nn.Module):
    compiled = torch.compile(model, backend="eager")
    attach(compiled, STEERING)
    torch.testing.assert_close(logits_of(compiled), logits_of(model))
    assert attached(compiled) is attached(model)


def test_what_is_no_steering_or_no_model_is_refused(model: nn.Module):
    with pytest.raises(SteeringError, match="'x' is no RouterSteering"):
        attach(model, "x")
    with pytest.raises(RouterError, match="'x' is no model"):
        find_routers("x")


def test_casting_the_model_does_not_round_the_coefficients(model: nn.Module):
    attach(model, STEERING, 1.001)
    model.bfloat16()
    logits_of(model)
    gate = model.model.layers[1].mlp.gate
    assert torch.equal(gate.steering_std[0], torch.tensor(1.001) * WEIGHTS[0])


def test_moving_and_casting_the_model_takes_steering_along(model: nn.Module):
    attach(model, STEERING)
    steered = logits_of(model)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    torch.testing.assert_close(logits_of(model.double()).float(), steered, atol=1e-4, rtol=1e-4)


def test_a_model_without_weights_is_checked_but_not_run():
    from architectures import tiny_config
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    handle = attach(model, STEERING)
    with pytest.raises(InterventionError, match="on the meta device"):
        model.to_empty(device="cpu")(input_ids=IDS)
    handle.remove()
    with pytest.raises(BaseModelError, match="layer 4 but Qwen3MoeForCausalLM has 4 layers"):
        attach(model, RouterSteering("s", [4], WEIGHTS[:1]))


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(RouterError, match="LlamaForCausalLM has no router: it is a dense model"):
        attach(LlamaForCausalLM(config), STEERING)


def test_a_quantized_router_is_refused():
    model = build("afmoe")
    gate = model.model.layers[1].mlp.router.gate
    gate.weight = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RouterError, match=r"layers.1.mlp.router' is quantized .torch.uint8"):
        find_routers(model)


class Deaf(nn.Module):
    """A router's linear layer that hides its product from torch functions."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("...h,eh->...e", hidden, self.weight)


def test_a_router_that_hides_its_logits_is_refused_when_attached():
    model = build("afmoe")
    base = logits_of(model)
    router = model.model.layers[1].mlp.router
    router.gate = Deaf(router.gate)
    with pytest.raises(InterventionError, match=r"layers.1.mlp.router' .*not seen"):
        attach(model, RouterSteering("s", [1, 2], WEIGHTS))
    assert attached(model) is None
    torch.testing.assert_close(logits_of(model), base)


def test_a_router_whose_choice_ignores_its_logits_is_refused(model: nn.Module):
    gate = model.model.layers[1].mlp.gate
    honest = gate.forward

    def stubborn(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = honest(hidden)
        return logits, torch.ones_like(weights), torch.zeros_like(index)

    gate.forward = stubborn
    with pytest.raises(InterventionError, match="whatever its logits are"):
        attach(model, STEERING)
    gate.forward = honest
    attach(model, STEERING)


def test_a_router_that_does_not_obey_force_is_refused(model: nn.Module):
    gate = model.model.layers[1].mlp.gate

    def sorting(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
        weights, index = logits.softmax(-1).sort(dim=-1, descending=True)
        return logits, weights[:, :2], index[:, :2]

    gate.forward = sorting
    with pytest.raises(InterventionError, match="does not obey forced"):
        attach(model, STEERING)
    attach(model, RouterSteering("soft", [1, 2], WEIGHTS))


def test_jetmoe_steers_feed_forward_experts_and_not_attention_experts():
    model = build("jetmoe")
    assert [r.path for r in find_routers(model)] == [
        f"model.layers.{i}.mlp.router" for i in range(len(model.model.layers))
    ]
