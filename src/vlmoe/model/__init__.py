"""The Multiway transformer: embeddings, attention, blocks, backbone; and what a model weighs and costs."""

from vlmoe.model.accounting import Account, account, describe_account
from vlmoe.model.backbone import Backbone, BackboneOutput
from vlmoe.model.flops import Flops, Shape, flops
from vlmoe.model.memory import Memory, Sharding, memory
from vlmoe.model.segments import Part, Segment
from vlmoe.model.sizes import Sizes, describe, sizes

__all__ = [
    "Account",
    "Backbone",
    "BackboneOutput",
    "Flops",
    "Memory",
    "Part",
    "Segment",
    "Shape",
    "Sharding",
    "Sizes",
    "account",
    "describe",
    "describe_account",
    "flops",
    "memory",
    "sizes",
]
