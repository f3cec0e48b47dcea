"""The embedded world: real handwritten digits and real glyphs in scenes with exact ground truth. See docs/world.md."""

from vlmoe.data.world.concepts import MAX_CONCEPTS, Concept, concepts
from vlmoe.data.world.languages import LANGUAGES
from vlmoe.data.world.scene import SPLITS, Scene, SceneObject, available_splits, relations
from vlmoe.data.world.world import FACTORS, World

__all__ = [
    "FACTORS", "LANGUAGES", "MAX_CONCEPTS", "SPLITS", "Concept", "Scene", "SceneObject", "World", "available_splits",
    "concepts", "relations",
]  # fmt: skip
