"""Commands about data: data make, data check, data show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmoe.cli.options import Json, Overrides, RecipeName, path, print_json
from vlmoe.config import UserError, home, load_recipe, recipe_names


def make(
    recipe: RecipeName,
    out: Annotated[
        Path, typer.Argument(parser=path, metavar="OUT", help="Folder for the shards; must not hold any yet.")
    ],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    split: Annotated[str, typer.Option(help="train, or a split that the data offer (docs/world.md).")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1_000,
) -> None:
    """Write a recipe's data (the embedded world by default) as WebDataset shards."""
    from vlmoe.data.make import make_shards

    paths = make_shards(
        load_recipe(recipe, overrides), out, kind=kind, split=split, samples=samples, per_shard=per_shard, progress=True
    )
    print(f"{samples} samples in {len(paths)} shards: {out}")


def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH|RECIPE", help="Shards (brace or glob pattern), a folder, parquet or arrow files; or a recipe."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of a recipe: overrides.")
    ] = None,
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    type_: Annotated[
        str, typer.Option("--type", help="shards, folder, parquet or arrow; auto tells by the path.")
    ] = "auto",
    image_column: Annotated[str, typer.Option(help="Of parquet and arrow: images' column, as in a recipe.")] = "image",
    text_column: Annotated[
        str, typer.Option(help="Of parquet, arrow, tables and .json members: where captions are, as in a recipe.")
    ] = "text",
    images: Annotated[
        Path | None, typer.Option(parser=path, help="Of parquet and arrow: folder of images named by their path.")
    ] = None,
    turns: Annotated[str, typer.Option(help="Of conversations: answer, the first one; or all.")] = "answer",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of a recipe: samples looked at of each source; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate anyone's data: counts, broken images, caption lengths, first errors with file and key.

    Accounts for every file and member: part of a sample, or ignored with a reason. Exits with 1 when a sample cannot be
    used, a key occurs twice or there is no sample; files that are ignored are no errors.

    Of a recipe (a packaged one, a YAML file or a run's folder): source by source its share, how often it is repeated
    over the run, texts that are cut, unknown tokens, samples that occur twice, what of the held-out samples is in
    training, and a verdict. Its sources say what the other options say of a path. Exits with 1 when there are problems.
    """
    from vlmoe.data.check import check_data, print_check

    folder = Path(home(path))
    named = path in recipe_names() and (overrides or not folder.is_dir())  # a folder here goes before a packaged recipe
    if named or path.endswith((".yaml", ".yml")) or (folder / "recipe.yaml").is_file():
        from vlmoe.data.check_recipe import check_recipe, print_recipe_check

        found = check_recipe(load_recipe(path, overrides), samples=samples, progress=not as_json)
        print_json(found) if as_json else print_recipe_check(found)
        if found["problems"]:
            raise typer.Exit(1)
        return
    if overrides:
        raise UserError(f"{path}: is no recipe, and only a recipe takes overrides like {overrides[0]}")
    report = check_data(
        home(path), kind=kind, type=type_, image_column=image_column, text_column=text_column,
        images=str(images or ""), turns=turns, progress=not as_json,
    )  # fmt: skip
    if as_json:
        print_json(report)
    else:
        print_check(report)
    if report["errors"]:
        raise typer.Exit(1)


def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(parser=path, help="The PNG to write.")] = Path("samples.png"),
    kind: Annotated[str, typer.Option(help="image, text or pair.")] = "pair",
    split: Annotated[str, typer.Option(help="train, or a held-out split.")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 16,
) -> None:
    """Save a contact sheet of samples as they enter the model: resized, masked, tokenized."""
    from vlmoe.data.show import show_data

    show_data(load_recipe(recipe, overrides), out, kind=kind, split=split, samples=samples, say=print)
    print(out)
