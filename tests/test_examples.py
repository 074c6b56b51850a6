"""The committed Qwen3-30B-A3B steering: rebuilt byte for byte, and fitting the real model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from build_qwen3_english_shared import FOLDER, main
from conftest import real_data
from transformers import AutoConfig, AutoModelForCausalLM

from steered_moe import RouterSteering, SteeredMoEForCausalLM, attach, find_routers
from steered_moe.errors import BaseModelError
from steered_moe.storage import read_repo

RECORDINGS = "real_routing/qwen3_30b_a3b_mgsm"
CONFIG = "model_configs/Qwen--Qwen3-30B-A3B.config.json"


# config -> routers, first and last layer with one, experts, top-k, as their makers publish them
REAL_MODELS = {
    "Qwen--Qwen3-30B-A3B.config": (48, 0, 47, 128, 8),
    "Qwen--Qwen3-235B-A22B.config": (94, 0, 93, 128, 8),
    "Qwen--Qwen3.5-35B-A3B.config": (40, 0, 39, 256, 8),
    "allenai--OLMoE-1B-7B.RECONSTRUCTED": (16, 0, 15, 64, 8),
    "deepseek-ai--DeepSeek-V2-Lite.config": (26, 1, 26, 64, 6),
    "deepseek-ai--DeepSeek-V3.config": (58, 3, 60, 256, 8),
    "meta-llama--Llama-4-Scout-17B-16E-Instruct.config": (48, 0, 47, 16, 1),
    "microsoft--Phi-3.5-MoE-instruct.DEFAULTS_FROM_TRANSFORMERS": (32, 0, 31, 16, 2),
    "mistralai--Mixtral-8x7B-v0.1.config": (32, 0, 31, 8, 2),
    "mistralai--Mixtral-8x22B-v0.1.config": (56, 0, 55, 8, 2),
    "openai--gpt-oss-20b.config": (24, 0, 23, 32, 4),
    "openai--gpt-oss-120b.config": (36, 0, 35, 128, 4),
    "zai-org--GLM-5.1.config": (75, 3, 77, 256, 8),
}


def at_full_size(name: str, folder: Path):
    """A real model at its full size, without weights."""
    shutil.copy(real_data(f"model_configs/{name}.json"), folder / "config.json")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("name", REAL_MODELS)
def test_routers_of_real_models_at_full_size(name: str, tmp_path: Path):
    model = at_full_size(name, tmp_path)
    routers = find_routers(model)
    sizes = {(router.num_experts, router.top_k) for router in routers}
    count, first, last, experts, top_k = REAL_MODELS[name]
    assert (len(routers), routers[0].layer, routers[-1].layer) == (count, first, last)
    assert sizes == {(experts, top_k)}
    layers = [router.layer for router in routers]
    attach(model, RouterSteering("all", layers, torch.ones(count, experts)))
    with pytest.raises(BaseModelError, match=f"{experts + 1} experts but layer {first}"):
        attach(model, RouterSteering("wide", layers, torch.ones(count, experts + 1)))


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory):
    return at_full_size("Qwen--Qwen3-30B-A3B.config", tmp_path_factory.mktemp("qwen3"))


def test_the_script_rebuilds_the_folder_byte_for_byte(tmp_path: Path):
    main(real_data(RECORDINGS), tmp_path)
    names = sorted(path.name for path in FOLDER.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_it_holds_the_released_settings():
    repo = read_repo(FOLDER)
    (steering,) = repo.steerings
    assert repo.strengths == [0.022]
    assert (steering.scale, steering.num_steered_experts) == ("abs", 420)
    assert repo.base["base_model_name_or_path"] == "Qwen/Qwen3-30B-A3B"
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25_000


def test_it_fits_the_real_model_at_full_size(real_model):
    repo = read_repo(FOLDER)
    assert sum(p.numel() for p in real_model.parameters()) == 30_532_122_624
    assert {p.device.type for p in real_model.parameters()} == {"meta"}
    routers = find_routers(real_model)
    assert [(r.layer, r.num_experts, r.top_k) for r in routers] == [(i, 128, 8) for i in range(48)]
    handle = attach(real_model, repo.steerings[0], repo.strengths[0])
    steered = [r.layer for r in routers if hasattr(r.module, "steering_abs")]
    assert steered == list(range(10, 40))
    handle.remove()


def test_a_steering_of_the_wrong_size_does_not_fit_it(real_model):
    for steering, says in [
        (RouterSteering("w", [48], torch.ones(1, 128)), "layer 48 but"),
        (RouterSteering("w", [47], torch.ones(1, 64)), "64 experts but layer 47"),
    ]:
        with pytest.raises(BaseModelError, match=says):
            attach(real_model, steering)


def test_loading_it_checks_the_real_config_before_weights(tmp_path: Path):
    shutil.copytree(FOLDER, tmp_path / "steered")
    (tmp_path / "base").mkdir()
    config = json.loads(real_data(CONFIG).read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"model.safetensors"):  # all that is missing is the weights
        SteeredMoEForCausalLM.from_pretrained(tmp_path / "steered", base_model=tmp_path / "base")
    config |= {"num_experts": 64}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="num_experts=128 but this base model has 64"):
        SteeredMoEForCausalLM.from_pretrained(tmp_path / "steered", base_model=tmp_path / "base")
