"""One model on many processes: who holds which weights, and how tokens reach experts that are elsewhere."""

from vlmoe.distributed.dispatcher import PeerDispatcher
from vlmoe.distributed.mesh import Mesh, make_mesh
from vlmoe.distributed.ranks import Ranks, is_first, joined
from vlmoe.distributed.sharding import ExpertShard, deal_experts, shard

__all__ = [
    "ExpertShard", "Mesh", "PeerDispatcher", "Ranks", "deal_experts", "is_first", "joined", "make_mesh", "shard",
]  # fmt: skip
