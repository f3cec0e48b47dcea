"""The sparse mixture-of-experts layer. Knows tensors, not modalities: `MoELayer` drops into any PyTorch model."""

from vlmoe.moe.dispatch import Plan, combine, dispatch, plan_dispatch
from vlmoe.moe.experts import Experts, FeedForward
from vlmoe.moe.layer import MoELayer, RoutingStats
from vlmoe.moe.replay import ROUTING_OPS, replay_context_fn
from vlmoe.moe.routing import Router, Routing, route

__all__ = [
    "ROUTING_OPS",
    "Experts",
    "FeedForward",
    "MoELayer",
    "Plan",
    "Router",
    "Routing",
    "RoutingStats",
    "combine",
    "dispatch",
    "plan_dispatch",
    "replay_context_fn",
    "route",
]
