"""Commands about recipes: recipe keys, recipe show."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmoe.cli.options import Json, Overrides, RecipeName, print_json
from vlmoe.config import FinetuneRecipe, Recipe, load_recipe, to_yaml


def keys(
    prefix: Annotated[
        str, typer.Argument(metavar="[PREFIX]", help="Only this key, or those of this group: model.vision.router.")
    ] = "",
    finetune: Annotated[bool, typer.Option("--finetune", help="The keys of a fine-tuning recipe.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of both kinds, as docs/recipe-keys.md.")] = False,
    as_json: Json = False,
) -> None:
    """Every key of a recipe: its type, its default and what it means. One line each."""
    from vlmoe.config.keys import as_page, as_text, groups, select

    if markdown:
        print(as_page(), end="")
        return
    found = select(groups(FinetuneRecipe if finetune else Recipe), prefix)
    print_json([vars(key) for group in found for key in group.keys]) if as_json else print(as_text(found))


def show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """What a recipe comes to, with what it takes from others, every key written out as YAML."""
    print(to_yaml(load_recipe(recipe, overrides)), end="")
