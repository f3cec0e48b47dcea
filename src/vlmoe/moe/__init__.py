"""The sparse mixture-of-experts layer. Knows tensors, not modalities: `MoELayer` drops into any PyTorch model."""

from vlmoe.moe.dispatch import Plan, combine, dispatch, plan_dispatch
from vlmoe.moe.experts import Experts, FeedForward
from vlmoe.moe.layer import MoELayer, RoutingStats
from vlmoe.moe.replay import ROUTING_OPS, replay_context_fn
from vlmoe.moe.routers import ROUTERS, Router
from vlmoe.moe.routing import Routing, choose_tokens, route
from vlmoe.moe.soft import SoftMoELayer, SoftRouter
from vlmoe.moe.upcycle import upcycle

__all__ = [
    "ROUTERS",
    "ROUTING_OPS",
    "Experts",
    "FeedForward",
    "MoELayer",
    "Plan",
    "Router",
    "Routing",
    "RoutingStats",
    "SoftMoELayer",
    "SoftRouter",
    "choose_tokens",
    "combine",
    "dispatch",
    "plan_dispatch",
    "replay_context_fn",
    "route",
    "upcycle",
]
