"""vLLM's OpenAI server as ``steered-moe serve --engine vllm`` starts it.

It is vLLM's own, with one difference: when its engine dies it ends with 1. vLLM's ends with 0,
which service managers take for a success.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

_SERVER = "vllm.entrypoints.openai.api_server"


def main() -> None:
    """Serve until a signal, or until the engine dies.

    Raises:
        SystemExit: With 1 and the reason when the engine has died.
    """
    died: list[BaseException] = []
    _watch(died)
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)
    if died:
        sys.exit(f"the vLLM engine has died: {died[0]}")


def _watch(died: list[BaseException]) -> None:
    """Note what vLLM tells all waiting requests when its engine dies."""
    from vllm.v1.engine.output_processor import OutputProcessor

    original = OutputProcessor.propagate_error

    def noted(self: Any, error: BaseException) -> Any:
        died.append(error)
        return original(self, error)

    OutputProcessor.propagate_error = noted


if __name__ == "__main__":
    main()
