"""The recipe: one typed description of a run, read from YAML and command-line overrides.

A recipe is a tree of plain dataclasses. Reading is strict: an unknown key, a wrong type or an impossible value is a
`RecipeError` that names the key, what it got and what it wanted. Anyone may import this package; it imports nothing of
ours.
"""

from vlmoe.config.finetune import TASKS, CaptionConfig, FilesConfig, FinetuneRecipe, TaskDataConfig
from vlmoe.config.json_reading import json_lines, parse_json, read_json
from vlmoe.config.reading import (
    flat,
    from_mapping,
    init_of,
    known_keys,
    load_finetune,
    load_recipe,
    override,
    recipe_names,
    to_mapping,
    to_yaml,
    with_later_keys,
)
from vlmoe.config.schema import (
    BatchConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    MaskingConfig,
    ModalityConfig,
    ModelConfig,
    Recipe,
    RecipeError,
    RouterConfig,
    RunConfig,
    SourceConfig,
    TextTokenizerConfig,
    TrainConfig,
    UserError,
    VisualTokenizerConfig,
    WorldConfig,
    sparse_blocks,
)

__all__ = [
    "TASKS",
    "BatchConfig",
    "CaptionConfig",
    "DataConfig",
    "EvalConfig",
    "FilesConfig",
    "FinetuneRecipe",
    "GuardConfig",
    "MaskingConfig",
    "ModalityConfig",
    "ModelConfig",
    "Recipe",
    "RecipeError",
    "RouterConfig",
    "RunConfig",
    "SourceConfig",
    "TaskDataConfig",
    "TextTokenizerConfig",
    "TrainConfig",
    "UserError",
    "VisualTokenizerConfig",
    "WorldConfig",
    "flat",
    "from_mapping",
    "init_of",
    "json_lines",
    "known_keys",
    "load_finetune",
    "load_recipe",
    "override",
    "parse_json",
    "read_json",
    "recipe_names",
    "sparse_blocks",
    "to_mapping",
    "to_yaml",
    "with_later_keys",
]
