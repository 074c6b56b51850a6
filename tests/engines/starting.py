"""A vLLM engine that is ended afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

EXTENSION = "steered_moe.vllm_worker.WorkerExtension"
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
       "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
_APART = "VLLM_ENABLE_V1_MULTIPROCESSING"


@contextmanager
def engine(base: Path, repo: Path | None, *, apart: bool = False, **options: Any) -> Iterator[LLM]:
    """An engine of a tiny model.

    Args:
        base: Checkpoint.
        repo: Its steering; None for an engine that is not asked to steer.
        apart: In a process of its own, as vLLM does by itself, which takes longer to start.
        options: Of vLLM.
    """
    config = {} if repo is None else {"steered_moe": {"repo_id": str(repo)}}
    given = {
        "additional_config": config, "skip_tokenizer_init": True, "dtype": "float32",
        "max_model_len": 128, "max_num_seqs": 24, "enforce_eager": True, "block_size": 32,
        "worker_extension_cls": EXTENSION, "disable_log_stats": True, **options,
    }  # fmt: skip
    os.environ |= {**CPU, _APART: str(int(apart))}
    llm: LLM | None = None
    try:
        llm = LLM(str(base), **given)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
