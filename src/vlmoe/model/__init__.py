"""The Multiway transformer: embeddings, attention, blocks, backbone, sizes."""

from vlmoe.model.backbone import Backbone, BackboneOutput
from vlmoe.model.segments import Part, Segment
from vlmoe.model.sizes import Sizes, describe, sizes

__all__ = ["Backbone", "BackboneOutput", "Part", "Segment", "Sizes", "describe", "sizes"]
