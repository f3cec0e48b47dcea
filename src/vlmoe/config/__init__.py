"""The recipe: one typed description of a run, read from YAML and command-line overrides.

A recipe is a tree of plain dataclasses. Reading is strict: an unknown key, a wrong type or an impossible value is a
`RecipeError` that names the key, what it got and what it wanted. Anyone may import this package; it imports nothing of
ours.
"""

from vlmoe.config.finetune import TASKS, CaptionConfig, FilesConfig, FinetuneRecipe, TaskDataConfig
from vlmoe.config.json_reading import json_lines, parse_json, read_json
from vlmoe.config.keys import known_keys
from vlmoe.config.layers import recipe_names
from vlmoe.config.parsing import home, read_yaml
from vlmoe.config.reading import (
    flat,
    from_mapping,
    init_of,
    load_finetune,
    load_recipe,
    override,
    override_value,
    to_mapping,
    to_yaml,
    with_later_keys,
)
from vlmoe.config.schema import (
    LEAST_BYTE_VOCABULARY,
    AugmentConfig,
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
    StreamConfig,
    TextTokenizerConfig,
    TrainConfig,
    UserError,
    VisualTokenizerConfig,
    WorldConfig,
    sparse_blocks,
)
from vlmoe.config.sealed import AlteredError, check_files, describe, read_sealed, write_sealed
from vlmoe.config.validation import check_scenes

__all__ = [
    "LEAST_BYTE_VOCABULARY",
    "TASKS",
    "AlteredError",
    "AugmentConfig",
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
    "StreamConfig",
    "TaskDataConfig",
    "TextTokenizerConfig",
    "TrainConfig",
    "UserError",
    "VisualTokenizerConfig",
    "WorldConfig",
    "check_files",
    "check_scenes",
    "describe",
    "flat",
    "from_mapping",
    "home",
    "init_of",
    "json_lines",
    "known_keys",
    "load_finetune",
    "load_recipe",
    "override",
    "override_value",
    "parse_json",
    "read_json",
    "read_sealed",
    "read_yaml",
    "recipe_names",
    "sparse_blocks",
    "to_mapping",
    "to_yaml",
    "with_later_keys",
    "write_sealed",
]
