"""The wrapper: from a folder, from the Hub, from a base; Auto classes, pipeline, saving."""

from __future__ import annotations

import io
import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import HubServer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeForCausalLM

from steered_moe import RouterSteering, SteeredMoEConfig, SteeredMoEForCausalLM, attach
from steered_moe.card_text import own_text
from steered_moe.errors import BaseModelError, FormatError, SteeringError
from steered_moe.storage import read_repo

PROMPT = "A router sends"
LENGTH = {"max_new_tokens": 10, "do_sample": False}


def answer(model, folder: Path, prompt: str = PROMPT) -> list[int]:
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    return model.generate(**inputs, **LENGTH)[0].tolist()


@torch.no_grad()
def logits_of(model) -> Tensor:
    return model(input_ids=torch.arange(5, 25).reshape(2, 10)).logits


@pytest.fixture
def model(tiny: Path):
    return SteeredMoEForCausalLM.from_pretrained(tiny / "steered")


def test_the_object_is_the_base_model(model, tiny: Path):
    assert isinstance(model, SteeredMoEForCausalLM)
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert type(model).__name__ == "SteeredMoEForCausalLM"
    assert model.config.model_type == "qwen3_moe"
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    assert set(model.state_dict()) == set(base.state_dict())
    assert model.get_memory_footprint() - base.get_memory_footprint() == 2 * 16 * 4
    recorded = model(input_ids=torch.tensor([[5, 6]]), output_router_logits=True).router_logits
    assert len(recorded) == 6


def test_it_steers_as_attach_does(model, tiny: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    plain = logits_of(base)
    handle = attach(base, RouterSteering.load(tiny / "steered"), strength=2.0)
    assert torch.equal(logits_of(model), logits_of(base))
    assert not torch.equal(logits_of(model), plain)
    with model.unsteered():
        assert torch.equal(logits_of(model), plain)
    with model.steered(0.5):
        handle.strength = 0.5
        assert torch.equal(logits_of(model), logits_of(base))
    assert model.strength == 2.0


def test_save_and_load_are_exact(model, tmp_path: Path, tiny: Path):
    extra = RouterSteering("extra", [1], torch.ones(1, 16), torch.eye(16)[:1], scale="none")
    model.add_steering(extra, -0.25)
    model.save_pretrained(tmp_path / "again")
    again = SteeredMoEForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.steerings == model.steerings
    assert again.strengths == {"middle": 2.0, "extra": -0.25}
    assert again.strength == again.strengths
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert files == {"config.json", "steering.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in (tmp_path / "again").iterdir()) < 10_000
    model.remove_steering("extra")
    assert not torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(SteeringError, match="2 steerings are attached"):
        _ = again.steering
    assert model.steering == RouterSteering.load(tiny / "steered")


def test_saving_twice_gives_the_same_bytes_and_keeps_an_edited_card(model, tmp_path: Path):
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for name in ("config.json", "steering.safetensors", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    (tmp_path / "one" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "one")
    assert own_text((tmp_path / "one" / "README.md").read_text()) == "mine"


def test_saving_refuses_what_it_cannot_keep(model, tmp_path: Path):
    with pytest.raises(SteeringError, match="state_dict: a steering repo holds no weights"):
        model.save_pretrained(tmp_path, state_dict={})
    model.set_strength([1.0, 0.0])
    with pytest.raises(SteeringError, match="middle has a strength per row"):
        model.save_pretrained(tmp_path)
    model.remove_steering("middle")
    with pytest.raises(SteeringError, match="no steering is attached"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_auto_classes_and_pipeline_give_the_same_tokens(model, tiny: Path):
    folder = tiny / "steered"
    expected = answer(model, folder)
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(auto, SteeredMoEForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(folder), SteeredMoEConfig)
    assert answer(auto, folder) == expected
    pipe = transformers.pipeline("text-generation", model=str(folder))
    assert isinstance(pipe.model, SteeredMoEForCausalLM)
    text = pipe(PROMPT, return_full_text=True, **LENGTH)[0]["generated_text"]
    assert text == pipe.tokenizer.decode(expected, skip_special_tokens=True)
    assert expected != answer(AutoModelForCausalLM.from_pretrained(tiny / "base"), folder)


def test_arguments_of_from_pretrained_reach_the_base(tiny: Path):
    folder = tiny / "steered"
    options = {
        "dtype": torch.bfloat16,
        "attn_implementation": "eager",
        "experts_implementation": "batched_mm",
        "device_map": "cpu",
    }
    for load in (SteeredMoEForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        model = load(folder, **options)
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert model.config._experts_implementation == "batched_mm"
        assert model.strength == 2.0
    assert load(folder, strength=0.5).strength == 0.5
    assert load(folder, strength={"middle": -1.0}).strength == -1.0
    with pytest.raises(SteeringError, match="no steering named 'late'; there is middle"):
        load(folder, strength={"late": 1.0})


def test_offload_through_the_wrapper(tiny: Path, tmp_path: Path, model):
    device_map = {name: "cpu" for name, _ in model.named_modules() if name.count(".") == 2}
    device_map |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"lm_head": "cpu", "model.layers.2": "disk"}
    device_map.pop("model.layers", None)
    offloaded = SteeredMoEForCausalLM.from_pretrained(
        tiny / "steered", device_map=device_map, offload_folder=str(tmp_path)
    )
    assert next(offloaded.model.layers[2].parameters()).is_meta
    torch.testing.assert_close(logits_of(offloaded), logits_of(model), atol=1e-5, rtol=1e-5)
    with model.unsteered():
        assert (logits_of(offloaded) - logits_of(model)).abs().max() > 0.1


def test_from_base_takes_a_name_or_a_loaded_model(tiny: Path):
    steering = RouterSteering.load(tiny / "steered")
    by_name = SteeredMoEForCausalLM.from_base(tiny / "base", steering, 2.0, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tiny / "base")
    in_place = SteeredMoEForCausalLM.from_base(loaded, [steering], 2.0)
    assert in_place is loaded
    assert torch.equal(logits_of(by_name), logits_of(in_place))
    with pytest.raises(BaseModelError, match="dtype cannot apply to a base model that is loaded"):
        SteeredMoEForCausalLM.from_base(loaded, steering, dtype="auto")


def test_it_has_no_weights_of_its_own(tiny: Path):
    config = AutoConfig.from_pretrained(tiny / "steered")
    with pytest.raises(BaseModelError, match="use from_pretrained"):
        AutoModelForCausalLM.from_config(config)
    with pytest.raises(BaseModelError, match=r"use SteeredMoEForCausalLM.from_pretrained\(repo\)"):
        SteeredMoEForCausalLM(config)


def test_the_config_round_trips_and_keeps_unknown_fields(tiny: Path, tmp_path: Path, caplog):
    folder = tmp_path / "newer"
    shutil.copytree(tiny / "steered", folder)
    content = json.loads((folder / "config.json").read_text())
    content |= {"base_model_name_or_path": str(tiny / "base"), "shiny": {"new": 1}}
    content["steerings"][0]["mood"] = "good"
    (folder / "config.json").write_text(json.dumps(content))
    repo = read_repo(folder)
    assert repo.extra == {"shiny": {"new": 1}}
    assert "unknown fields are kept but not used: shiny" in caplog.text
    assert "mood" in caplog.text
    assert repo.config() == content
    config = AutoConfig.from_pretrained(tiny / "steered")
    config.save_pretrained(tmp_path / "config")
    saved = json.loads((tmp_path / "config" / "config.json").read_text())
    assert saved == json.loads((tiny / "steered" / "config.json").read_text())


def test_what_a_newer_version_wrote_survives_loading_and_saving(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny / "steered", tmp_path / "newer")
    content = json.loads((tmp_path / "newer" / "config.json").read_text())
    content |= {"shiny": 1}
    (tmp_path / "newer" / "config.json").write_text(json.dumps(content))
    model = SteeredMoEForCausalLM.from_pretrained(tmp_path / "newer", base_model=tiny / "base")
    model.save_pretrained(tmp_path / "saved")
    assert read_repo(tmp_path / "saved").extra == {"shiny": 1}


def test_a_base_checkpoint_is_never_overwritten(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny / "base", tmp_path / "base")
    before = (tmp_path / "base" / "config.json").read_bytes()
    steering = RouterSteering.load(tiny / "steered")
    model = SteeredMoEForCausalLM.from_base(tmp_path / "base", steering)
    with pytest.raises(FormatError, match=r"belongs to something else .model_type 'qwen3_moe'."):
        model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "config.json").read_bytes() == before


def test_a_local_base_moves_with_its_steering_even_through_links(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny / "base", tmp_path / "real" / "base@1")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    steering = RouterSteering.load(tiny / "steered")
    model = SteeredMoEForCausalLM.from_base(tmp_path / "real" / "base@1", steering)
    model.save_pretrained(tmp_path / "link" / "steered")
    assert read_repo(tmp_path / "real" / "steered").base["base_model_name_or_path"] == "../base@1"
    shutil.move(tmp_path / "real", tmp_path / "moved")
    again = SteeredMoEForCausalLM.from_pretrained(tmp_path / "moved" / "steered")
    assert torch.equal(logits_of(again), logits_of(model))
    base = tmp_path / "moved" / "base@1"
    override = SteeredMoEForCausalLM.from_pretrained(tiny / "steered", base_model=base, strength=1)
    assert torch.equal(logits_of(override), logits_of(model))


def test_a_steered_model_can_be_pickled_and_copied(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is type(model)
    assert torch.equal(logits_of(again), logits_of(model))
    for other in (again, deepcopy(model)):
        assert type(other) is type(model)
        other.set_strength(0.0)
        assert not torch.equal(logits_of(other), logits_of(model))
    assert model.strength == 2.0


@pytest.mark.parametrize("load", [SteeredMoEForCausalLM, AutoModelForCausalLM])
def test_code_of_the_base_is_not_run_and_nobody_is_asked(tiny: Path, tmp_path, capfd, load):
    shutil.copytree(tiny, tmp_path / "repo")
    config = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "repo" / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "repo" / "base" / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load.from_pretrained(tmp_path / "repo" / "steered")
    assert "Do you wish to run" not in capfd.readouterr().out


def test_loading_info_and_rows_at_load_time(tiny: Path):
    folder = tiny / "steered"
    model, info = SteeredMoEForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, SteeredMoEForCausalLM)
    assert not info["missing_keys"]
    rows = SteeredMoEForCausalLM.from_pretrained(folder, strength=[0.0, 2.0])
    with model.unsteered():
        torch.testing.assert_close(logits_of(rows)[0], logits_of(model)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(rows)[1], logits_of(model)[1], atol=1e-5, rtol=1e-5)


def test_arguments_that_could_not_act_are_refused(tiny: Path, model):
    folder = tiny / "steered"
    with pytest.raises(BaseModelError, match="num_experts_per_tok=2 cannot be changed"):
        AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=2)
    with pytest.raises(BaseModelError, match="config is a Qwen3MoeConfig"):
        SteeredMoEForCausalLM.from_pretrained(folder, config=model.config)
    with pytest.raises(FormatError, match="subfolder='x'"):
        SteeredMoEForCausalLM.from_pretrained(folder, subfolder="x")
    with pytest.raises(SteeringError, match="no steering is given"):
        SteeredMoEForCausalLM.from_base(tiny / "base", [])
    shown = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True)
    assert shown.config.output_hidden_states


def test_bad_strengths_are_refused_before_weights_are_loaded(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "repo")
    (tmp_path / "repo" / "base" / "model.safetensors").unlink()
    for strength in (float("nan"), "much", {"middle": float("inf")}):
        with pytest.raises(SteeringError, match="strength is"):
            SteeredMoEForCausalLM.from_pretrained(tmp_path / "repo" / "steered", strength=strength)


def test_from_base_attaches_all_or_nothing(tiny: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    plain = logits_of(base)
    good, bad = RouterSteering.load(tiny / "steered"), RouterSteering("b", [9], torch.ones(1, 16))
    with pytest.raises(BaseModelError, match="layer 9"):
        SteeredMoEForCausalLM.from_base(base, [good, bad])
    assert torch.equal(logits_of(base), plain)
    assert not isinstance(base, SteeredMoEForCausalLM)


def publish(hub: HubServer, tiny: Path) -> tuple[str, str]:
    """Put base and steering on the Hub, the base twice; returns the steered commit of each."""
    base = {path.name: path.read_bytes() for path in (tiny / "base").iterdir()}
    commit = hub.commit("user/base", base)
    changed = json.loads(base["config.json"]) | {"num_experts_per_tok": 2, "rms_norm_eps": 0.1}
    hub.commit("user/base", {"config.json": json.dumps(changed).encode()})
    steering = {path.name: path.read_bytes() for path in (tiny / "steered").iterdir()}
    content = json.loads(steering["config.json"])
    content |= {"base_model_name_or_path": "user/base", "base_model_revision": commit}
    steering["config.json"] = json.dumps(content).encode()
    return commit, hub.commit("user/steered", steering)


def test_from_the_hub_with_pinned_revisions(hub: HubServer, tiny: Path, tmp_path: Path, model):
    base_commit, commit = publish(hub, tiny)
    hub.commit("user/steered", {"steering.safetensors": b"broken later"})
    cache = {"cache_dir": tmp_path / "cache"}
    loaded = SteeredMoEForCausalLM.from_pretrained("user/steered", revision=commit, **cache)
    assert torch.equal(logits_of(loaded), logits_of(model))
    again = SteeredMoEForCausalLM.from_pretrained(f"user/steered@{commit}", **cache)
    assert torch.equal(logits_of(again), logits_of(model))
    auto = AutoModelForCausalLM.from_pretrained("user/steered", revision=commit, **cache)
    assert torch.equal(logits_of(auto), logits_of(model))
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        SteeredMoEForCausalLM.from_pretrained("user/steered", **cache)
    loaded.save_pretrained(tmp_path / "saved")
    assert read_repo(tmp_path / "saved").base["base_model_revision"] == base_commit


def test_nothing_of_the_base_is_fetched_before_the_steering_is_checked(
    hub: HubServer, tiny, tmp_path
):
    publish(hub, tiny)
    hub.commit("user/steered", {"steering.safetensors": b"broken"})
    with pytest.raises(FormatError):
        SteeredMoEForCausalLM.from_pretrained("user/steered", cache_dir=tmp_path)
    assert not any("user/base" in request for request in hub.requests)
    wrong = RouterSteering("w", [1], torch.ones(1, 8))
    with pytest.raises(BaseModelError, match="8 experts but layer 1"):
        SteeredMoEForCausalLM.from_base("user/base", wrong, cache_dir=tmp_path)
    assert not any("user/base" in r and "safetensors" in r for r in hub.requests)
    assert any("user/base" in r and "config.json" in r for r in hub.requests)


def test_from_base_on_the_hub_records_the_commit(hub: HubServer, tiny: Path, tmp_path: Path):
    commit, _ = publish(hub, tiny)
    model = SteeredMoEForCausalLM.from_base(
        "user/base", RouterSteering.load(tiny / "steered"), revision=commit, cache_dir=tmp_path
    )
    model.save_pretrained(tmp_path / "saved")
    base = read_repo(tmp_path / "saved").base
    assert base["base_model_name_or_path"] == "user/base"
    assert base["base_model_revision"] == commit


def test_a_local_base_is_not_pushed_but_its_hub_id_is(hub: HubServer, tiny: Path, tmp_path, model):
    hub.commit("user/plain", {p.name: p.read_bytes() for p in (tiny / "base").iterdir()})
    hub.requests.clear()
    with pytest.raises(FormatError, match=r"local folder .*base, which nobody else has"):
        model.push_to_hub("user/local")
    assert not hub.requests
    model.push_to_hub("user/local", base_model="user/plain")
    saved = SteeredMoEForCausalLM.from_pretrained("user/local", cache_dir=tmp_path)
    assert saved.base_model_name == "user/plain"


def test_push_is_one_commit_of_kilobytes_that_loads_again(hub: HubServer, tiny: Path, tmp_path):
    commit, _ = publish(hub, tiny)
    steering = RouterSteering.load(tiny / "steered")
    model = SteeredMoEForCausalLM.from_base(
        "user/base", steering, 2.0, revision=commit, cache_dir=tmp_path
    )
    hub.requests.clear()
    url = model.push_to_hub("user/pushed", commit_message="first")
    assert "user/pushed/commit/" in url
    assert sum("/commit/main" in r and r.startswith("POST") for r in hub.requests) == 1
    again = SteeredMoEForCausalLM.from_pretrained("user/pushed", cache_dir=tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert RouterSteering.load("user/pushed") == steering
