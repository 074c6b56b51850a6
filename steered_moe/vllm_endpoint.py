"""An HTTP route of vLLM's server that reads and changes the default strength; opt-in.

    VLLM_PLUGINS=steered_moe steered-moe serve user/x --engine vllm
    curl localhost:8000/v1/steered_moe --json '{"strength": 0.5}'

vLLM loads endpoint plugins (entry point ``vllm.endpoint_plugins``) only where ``VLLM_PLUGINS``
names them. The route begins with ``/v1``, so that ``--api-key`` guards it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict

from steered_moe.errors import SteeredMoEError
from steered_moe.vllm_settings import by_name_checked, settings_of

PATH = "/v1/steered_moe"


class Change(BaseModel):
    """What is put: a strength for all steerings, or by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    strength: float | dict[str, float]


class Endpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "steered_moe"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""
        app.add_api_route(PATH, self.state, methods=["GET"])
        app.add_api_route(PATH, self.change, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the way to the engine."""
        self._engine = engine_client

    async def state(self) -> dict[str, Any]:
        """Strengths and layers of each worker."""
        self._settings()
        return {"workers": await self._engine.collective_rpc("steered_moe_state")}

    async def change(self, asked: Change) -> dict[str, Any]:
        """Change what requests that ask for nothing get; cached prefixes are dropped.

        Steerings that a mapping does not name keep what they have.
        """
        settings = self._settings()
        now = (await self._engine.collective_rpc("steered_moe_state"))[0]["strengths"]
        try:
            strengths = by_name_checked(asked.strength, now)
            settings.check(strengths)
        except SteeredMoEError as error:
            raise HTTPException(400, str(error)) from error
        found = await self._engine.collective_rpc("steered_moe_set", args=(strengths,))
        return {"strengths": found[0]}

    def _settings(self) -> Any:
        config = self._engine.vllm_config
        settings = settings_of(config)
        if settings is None:
            raise HTTPException(400, "this engine steers nothing; start it with a steering repo")
        if not config.parallel_config.worker_extension_cls:
            raise HTTPException(
                400,
                "start the server with --worker-extension-cls "
                "steered_moe.vllm_worker.WorkerExtension, as steered-moe serve does",
            )
        return settings
