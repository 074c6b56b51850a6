"""Two processes on the CPU, in every parallel mode of transformers, next to one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from transformers.distributed import DistributedConfig

MODES: dict[str, dict[str, int]] = {
    "tensor": {"tp_size": 2},
    "tensor and expert": {"tp_size": 2, "ep_size": 2},
    "fully sharded": {"fsdp_size": 2},
    "fully sharded and expert": {"fsdp_size": 2, "ep_size": 2},
    "pipeline": {"pp_size": 2},
}
WORKER = ROOT / "tests" / "parallel_worker.py"
TOLERANCE = 1e-3  # of log-probabilities; sums of two halves round otherwise


def run(repo: Path, mode: dict[str, int], out: Path, processes: int) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), WORKER, repo, json.dumps(mode), out],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steered in layers of both halves of the model, softly and by force."""
    from tiny_random_moe import EXPERTS, build_model, build_tokenizer

    from steered_moe import RouterSteering, SteeredMoEForCausalLM

    folder = tmp_path_factory.mktemp("parallel")
    build_model().save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    weights = 2 * torch.randn(3, EXPERTS, generator=generator)
    force = torch.zeros(3, EXPERTS)
    force[0, 1], force[2, 0] = 1, -1
    steering = RouterSteering("both", [0, 2, 5], weights, force)
    SteeredMoEForCausalLM.from_base(folder / "base", steering).save_pretrained(folder / "repo")
    return folder / "repo"


@pytest.fixture(scope="module")
def alone(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = run(repo, {}, tmp_path_factory.mktemp("alone") / "out.pt", 1)
    starts = [found[name].flatten()[:9] for name in ("steered", "base", "half")]
    assert len({tuple(start.tolist()) for start in starts}) == 3
    return found


@pytest.mark.parametrize("name", MODES)
def test_two_processes_are_equal_to_one(
    repo: Path, alone: dict[str, Any], name: str, tmp_path: Path
) -> None:
    if lacking := [size for size in MODES[name] if not hasattr(DistributedConfig, size)]:
        pytest.skip(f"this transformers has no {lacking[0]}")
    found = run(repo, MODES[name], tmp_path / "out.pt", 2)
    assert torch.equal(found["tokens"], alone["tokens"])
    for which in ("steered", "base", "half"):
        mine, one = (x[which].log_softmax(-1) for x in (found, alone))
        torch.testing.assert_close(mine, one, atol=TOLERANCE, rtol=0)
    assert (found["steered"] - alone["base"]).abs().max() > 10 * TOLERANCE  # the twin
    assert found.keys() == alone.keys()
    assert torch.equal(found["profile counts"], alone["profile counts"])
    assert alone["profile counts"].sum(dim=(0, 2)).min() > 0  # in every layer
    for which in (name for name in alone if name.startswith("profile ")):
        torch.testing.assert_close(found[which], alone[which], atol=1e-4, rtol=1e-4)
