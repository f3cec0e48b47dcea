"""From the recipe's `data.sources` to sources: which there are, and which held-out splits they offer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlmoe.config import DataConfig, ModelConfig, Recipe, SourceConfig, UserError
from vlmoe.data.arrow import ArrowSource
from vlmoe.data.files import FileOptions, FileSource
from vlmoe.data.folder import ImageFolder, TextLines, existing
from vlmoe.data.parquet import ParquetSource
from vlmoe.data.sample import KINDS, Source
from vlmoe.data.shards import ShardSource
from vlmoe.data.stream import StreamSource, expand, held_out_of_stream
from vlmoe.data.world import SPLITS, World, available_splits


def splits_of(source: SourceConfig, data: DataConfig) -> tuple[str, ...]:
    """The splits that a source offers, "train" first."""
    if source.type == "world":
        return available_splits(data.world)
    return (*(["train"] if source.held_out < 1 else []), *(["val"] if source.held_out > 0 else []))


def held_out_splits(recipe: Recipe, kind: str | None = None) -> list[str]:
    """Splits that can be evaluated: those that every kind in the batch offers, or those of one kind."""
    data = recipe.data
    kinds = [kind] if kind else [k for k in KINDS if getattr(data.batch, k)]
    offered = [{s for source in data.sources if source.kind == k for s in splits_of(source, data)} for k in kinds]
    return [split for split in SPLITS if split != "train" and all(split in splits for splits in offered)]


def build_sources(
    data: DataConfig,
    model: ModelConfig,
    kind: str,
    split: str = "train",
    seed: int = 0,
    factors: bool = False,
    record: Path | None = None,
) -> list[tuple[Source, float]]:
    """The sources of one kind with their weights.

    factors: sources that know the truth fill in `patch_factors` and `spans`. record: where sources that are read in
    streams keep their ledgers.

    Raises UserError when no source of the kind has the split, or a path cannot be read.
    """
    built: list[tuple[Source, float]] = []
    for number, config in enumerate(data.sources):
        if config.kind != kind or split not in splits_of(config, data):
            continue
        if config.type == "world":
            source: Source = World(
                data.world, config.kind, split=split, seed=seed, patch=model.patch if factors else None
            )
        else:
            options = FileOptions.of(config, data, model, split, factors)
            if config.read == "random":
                source = open_files(config.type, options)
            elif split == "train":
                source = StreamSource(options, config, data.stream, seed, number, record)
            else:
                source = held_out_of_stream(options, config.type)
        built.append((source, config.weight))
    if not built:
        raise UserError(f"data.sources: no source has {kind} samples for the split '{split}'")
    return built


def open_files(type: str, options: FileOptions) -> FileSource:
    """A file source by its type: shards, folder, parquet or arrow."""
    if type == "shards":
        return ShardSource(options)
    if type == "parquet":
        return ParquetSource(options)
    if type == "arrow":
        return ArrowSource(options)
    return TextLines(options) if options.kind == "text" else ImageFolder(options)


def check_paths(data: DataConfig) -> None:
    """Raises UserError where a file or folder that a source in the batch names is not there. Nothing is read."""
    for config in data.sources:
        if config.type == "world" or not getattr(data.batch, config.kind):
            continue
        if config.type == "folder":
            existing(config.path, config.kind)
        else:
            expand(config.path, config.type)
        if config.images and not Path(config.images).is_dir():
            raise UserError(f"{config.type} {config.path}: images {config.images}: no such folder")


def understood_of(sources: Iterable[Source]) -> list[str]:
    """What sources take for image, text and codes where that had to be found out, in lines for people."""
    return [
        f"{source.kind} of {source.name}: {line}"
        for source in sources
        if isinstance(source, (FileSource, StreamSource))
        for line in source.understood()
    ]


def warnings_of(sources: Iterable[Source]) -> list[str]:
    """What a run of these sources should not begin without, in lines for people."""
    return [
        f"{source.kind} of {source.name}: {line}"
        for source in sources
        if isinstance(source, StreamSource)
        for line in source.warnings()
    ]


def read_text(source: Source, index: int) -> str | None:
    """A sample's text alone; sources with a `text` method are spared reading the image."""
    text = getattr(source, "text", None)
    return text(index) if text else source[index].text
