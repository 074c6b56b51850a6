"""Shared fixtures. A Hub server of our own runs before anything imports huggingface_hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
HUB = HubServer.start()
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HOME": mkdtemp(prefix="steered-moe-hub-"),
    "HF_TOKEN": "hf_test",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "tiny_multilingual_moe")]

import torch  # noqa: E402

torch.set_num_threads(1)


def real_data(folder: str) -> Path:
    """A folder of the real data, which lies beside the project and not in it; else skip."""
    path = DATA / folder
    if not path.exists():
        pytest.skip(f"the real data folder {folder} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint in ``base`` and a steering repo in ``steered``."""
    from tiny_random_moe import write

    return write(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture
def hub() -> HubServer:
    """The local Hub server, with an empty log of requests."""
    HUB.requests.clear()
    return HUB


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many architectures passed every check that was run on them."""
    states: dict[str, bool] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if "test_architectures.py" in report.nodeid and "[" in report.nodeid:
                name = report.nodeid.partition("[")[2].rstrip("]").partition("-")[0]
                states[name] = states.get(name, True) and outcome == "passed"
    if states:
        terminalreporter.write_line(f"{sum(states.values())}/{len(states)} architectures")
