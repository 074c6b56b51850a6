"""Steer the routers of Mixture-of-Experts language models at inference time."""

from steered_moe.configuration import SteeredMoEConfig
from steered_moe.intervention import attach
from steered_moe.modeling import SteeredMoEForCausalLM
from steered_moe.profile import RoutingProfile
from steered_moe.routers import find_routers
from steered_moe.steering import RouterSteering

__version__ = "0.1.0"

__all__ = [
    "RouterSteering",
    "RoutingProfile",
    "SteeredMoEConfig",
    "SteeredMoEForCausalLM",
    "attach",
    "find_routers",
]
