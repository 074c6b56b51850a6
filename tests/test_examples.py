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


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory):
    """The real model at its full size, without weights."""
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copy(real_data(CONFIG), folder / "config.json")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


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
