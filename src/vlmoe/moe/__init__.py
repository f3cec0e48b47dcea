"""The sparse mixture-of-experts layer. Knows tensors, not modalities: `MoELayer` drops into any PyTorch model."""

from vlmoe.moe.dispatch import Dispatcher, Groups, LocalDispatcher
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
    "Dispatcher",
    "Experts",
    "FeedForward",
    "Groups",
    "LocalDispatcher",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingStats",
    "SoftMoELayer",
    "SoftRouter",
    "choose_tokens",
    "replay_context_fn",
    "route",
    "upcycle",
]
