"""A vLLM server in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from starting import CPU

OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]


@contextmanager
def serving(
    repo: Path, *options: str, log: Path | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``steered-moe serve --engine vllm``: the process, and the address of its API."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = "from steered_moe.cli import app; app()"
    command = ["serve", str(repo), "--engine", "vllm", "--port", str(port), *OPTIONS, *options]
    with (log or Path(os.devnull)).open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *command],
            env={**os.environ, **CPU, **environment}, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            _wait(process, f"http://127.0.0.1:{port}/v1", environment.get("VLLM_API_KEY", "-"))
            yield process, f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, key: str) -> None:
    client = openai.OpenAI(base_url=address, api_key=key, max_retries=0)
    for _ in range(360):
        assert process.poll() is None, "the server has ended"
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(0.5)
        else:
            return
    raise TimeoutError("the server does not answer")
