"""What goes wrong around a vLLM engine is said, and nothing hangs."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make engines runs these")

import openai
import psutil
import torch
import vllm
from checkpoints import write_base, write_repo
from servers import serving
from starting import engine
from vllm.config import VllmConfig

from steered_moe import RouterSteering
from steered_moe.embedded import embedded_model
from steered_moe.errors import InterventionError, SteeredMoEError
from steered_moe.vllm_points import check_release

REPO = Path(embedded_model())


def test_a_worker_that_is_killed_during_a_request_ends_the_server(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(REPO, log=log) as (process, address):
        client = openai.OpenAI(base_url=address, api_key="-", max_retries=0, timeout=60)
        [model] = client.models.list().data
        stream = client.completions.create(
            model=model.id, prompt="Tom", max_tokens=240, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(iter(stream))
        children = psutil.Process(process.pid).children(recursive=True)
        [core] = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
        core.send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError):
            _read(stream, client)
        assert process.wait(timeout=60) == 1
    assert "the vLLM engine has died" in log.read_text(errors="replace")


def _read(stream: Any, client: openai.OpenAI) -> None:
    """The rest of the answer, and where it just ends, another one."""
    for _ in stream:
        pass
    client.completions.create(model="any", prompt="Tom", max_tokens=1)


def test_a_steering_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = write_base("olmoe", tmp_path / "base")
    repo = write_repo(base, tmp_path / "repo", force=False)
    wide = RouterSteering("std", [1, 2], torch.ones(2, 12))
    wide.save(repo)
    with pytest.raises(SteeredMoEError, match="12"), engine(base, repo):
        pass


def test_an_untested_release_is_said_and_one_that_lacks_a_method_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="steered_moe"):
        check_release()
        assert not caplog.text
        monkeypatch.setattr(vllm, "__version__", "0.99.1")
        check_release()
    assert "tested with vLLM 0.32, this is 0.99.1" in caplog.text
    monkeypatch.delattr(VllmConfig, "_get_v2_model_runner_unsupported_features")
    told = "vLLM 0.99.1 lacks VllmConfig._get_v2_model_runner_unsupported_features"
    with pytest.raises(InterventionError, match=told):
        check_release()
