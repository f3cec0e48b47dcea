"""What a recipe's data are like before a run is spent on them: source by source, and what the splits share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmoe.config import Recipe
from vlmoe.data.collate import Collator
from vlmoe.data.loader import HELD_OUT_SEED
from vlmoe.data.mixture import Schedule
from vlmoe.data.near import Look, look_at, near
from vlmoe.data.sample import ENDLESS, KINDS, BadSample, Source
from vlmoe.data.sources import build_sources, understood_of, warnings_of
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer

MADE = 2000  # samples looked at of a source that makes them without end
# What is worth a word: shares of texts or tokens, times that a sample is shown.
MOST_CUT, MOST_UNKNOWN, MOST_SAME, MOST_REPEATS, FEWEST = 0.1, 0.02, 0.05, 50, 30
MOST_NEAR = 0.01  # of held-out images: a few look nearly the same as another and are not


@dataclass
class _Seen:
    """What the samples of one source and split are. captions: digests of the different ones. pictures: likewise, each
    with its first sample's key. looks: by the same digests; none of a source without end."""

    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    cut: int = 0
    tokens: int = 0
    unknown: int = 0
    images: int = 0
    pictures: dict[bytes, str] = field(default_factory=dict)
    looks: dict[bytes, Look] = field(default_factory=dict)
    captions: set[bytes] = field(default_factory=set)


def check_recipe(
    recipe: Recipe, tokenizer: TextTokenizer | None = None, samples: int | None = None, progress: bool = False
) -> dict[str, Any]:
    """Read the data of a recipe as its run would, each file source's samples once.

    tokenizer: the run's; without one the recipe's is read or trained. samples: of each source and split, at most; None:
    all, of a source that never ends 2,000.

    Returns a report fit for JSON: `sources` (for each source that trains: `kind`, `name`, `share` of its kind's
    samples, `samples`, `stream` (whether it is read as one, so that its samples are not counted), `looked_at`, `bad`,
    `reasons`, `repeats` over the run (None where it never repeats or that is not known), `cut` and
    `unknown` (shares of texts cut at model.max_text, of tokens not in the vocabulary), `same_captions` and
    `same_images` (shares that occurred before in the source), `near_images` (share nearly the same as an earlier one,
    and not the same; None where there is no end of them), `near` (the keys of two such)), `held_out` (kind ->
    `samples`; `captions` and `images`, the shares of its different ones that occur in training, too; `near_images`, the
    share nearly the same as one in training, and not the same; `near`), `understood`, and `problems`, the verdict in
    words.

    Raises UserError when a source cannot be opened.
    """
    tokenizer = tokenizer or build_text_tokenizer(recipe)
    report: dict[str, Any] = {"recipe": recipe.name, "sources": [], "held_out": {}, "understood": []}
    steps = recipe.train.steps * recipe.train.accumulate
    warnings: list[str] = []
    for kind in KINDS:
        batch = getattr(recipe.data.batch, kind)
        if not batch:
            continue
        collator = Collator(recipe.model, recipe.data.masking, tokenizer, kind)
        built = build_sources(recipe.data, recipe.model, kind, "train", recipe.seed)
        schedule = Schedule([weight for _, weight in built])
        trained: list[_Seen] = []
        for (source, _), count in zip(built, schedule.counts.tolist(), strict=True):
            share = count / schedule.length
            seen = _look(source, collator, samples, progress)
            trained.append(seen)
            report["sources"].append(_row(source, seen, share, steps * batch * share))
        report["understood"] += understood_of(source for source, _ in built)
        warnings += warnings_of(source for source, _ in built)
        held = [s for s, _ in build_sources(recipe.data, recipe.model, kind, "val", HELD_OUT_SEED)]
        report["held_out"][kind] = _overlap([_look(s, collator, samples, progress) for s in held], trained)
    report["problems"] = warnings + _problems(report, recipe)
    return report


def _look(source: Source, collator: Collator, most: int | None, progress: bool) -> _Seen:
    whole = MADE if len(source) >= ENDLESS else len(source)
    seen = _Seen(samples=min(whole, most or whole))
    rows = range(seen.samples)
    name = f"{source.kind} of {getattr(source, 'name', 'the world')}"
    for index in track(rows, name, transient=True) if progress else rows:
        try:
            ready = collator.ready(source[index])
        except BadSample as error:
            seen.bad[error.reason.split(":")[0].split(" (")[0]] += 1
            continue
        if ready.sample.text is not None:
            seen.texts += 1
            seen.cut += ready.cut
            words = ready.ids[1:-1]
            seen.tokens += len(words)
            seen.unknown += sum(word == collator.tokenizer.unk_id for word in words)
            seen.captions.add(_digest(ready.sample.text.encode()))
        if ready.sample.image is not None:
            seen.images += 1
            digest = _digest(ready.sample.image.tobytes())
            if digest not in seen.pictures:
                seen.pictures[digest] = ready.sample.key
                if len(source) < ENDLESS:
                    seen.looks[digest] = look_at(ready.sample.image)
    return seen


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=16).digest()


def _row(source: Source, seen: _Seen, share: float, draws: float) -> dict[str, Any]:
    bad, keys = sum(seen.bad.values()), list(seen.pictures.values())
    alike = near(list(seen.looks.values()))
    return {
        "kind": source.kind,
        "name": str(getattr(source, "name", "") or "world"),
        "share": share,
        "samples": None if len(source) >= ENDLESS else len(source),
        "stream": hasattr(source, "readers"),
        "looked_at": seen.samples,
        "bad": bad,
        "reasons": dict(seen.bad.most_common()),
        "repeats": None if len(source) >= ENDLESS else draws / max(1, len(source)),
        "cut": _share(seen.cut, seen.texts),
        "unknown": _share(seen.unknown, seen.tokens),
        "same_captions": _share(seen.texts - len(seen.captions), seen.texts),
        "same_images": _share(seen.images - len(seen.pictures), seen.images),
        "near_images": _share(len(alike), seen.images) if seen.looks else None,
        "near": next(([keys[a], keys[b]] for b, a in sorted(alike.items())), []),
    }


def _overlap(held: list[_Seen], trained: list[_Seen]) -> dict[str, Any]:
    found: dict[str, Any] = {"samples": sum(seen.samples for seen in held)}
    for part, name in (("captions", "captions"), ("images", "pictures")):
        mine = {digest for seen in held for digest in getattr(seen, name)}
        theirs = {digest for seen in trained for digest in getattr(seen, name)}
        found[part] = _share(len(mine & theirs), len(mine))
    known, looked = _looks(trained), _looks(held)
    others = [look for digest, look in looked.items() if digest not in known]
    alike = near([look for _, look in others], [look for _, look in known.values()])
    found["near_images"] = _share(len(alike), len(looked)) if known else None
    keys = [key for key, _ in known.values()]
    found["near"] = next(([others[b][0], keys[a]] for b, a in sorted(alike.items())), [])
    return found


def _looks(group: list[_Seen]) -> dict[bytes, tuple[str, Look]]:
    """Key of and look at each different picture."""
    return {digest: (seen.pictures[digest], look) for seen in group for digest, look in seen.looks.items()}


def _share(part: int, whole: int) -> float | None:
    """None where there is nothing to take a share of."""
    return part / whole if whole else None


def _problems(report: dict[str, Any], recipe: Recipe) -> list[str]:
    found = []
    for row in report["sources"]:
        where = f"{row['kind']} of {row['name']}"
        bad = row["bad"] / max(1, row["looked_at"])
        if bad > recipe.data.max_bad_share:
            first = next(iter(row["reasons"]))
            allowed = f"data.max_bad_share allows {recipe.data.max_bad_share:.1%}"
            found.append(f"{where}: {bad:.1%} of the samples cannot be used, most often: {first}; {allowed}")
        if row["repeats"] is not None and row["repeats"] > MOST_REPEATS:
            found.append(
                f"{where}: each sample is shown {row['repeats']:,.0f} times; take more data, fewer steps or a smaller "
                "weight"
            )
        if (row["cut"] or 0) > MOST_CUT:
            found.append(
                f"{where}: {row['cut']:.0%} of the texts are cut at model.max_text = {recipe.model.max_text} tokens"
            )
        if (row["unknown"] or 0) > MOST_UNKNOWN:
            found.append(f"{where}: {row['unknown']:.1%} of the tokens are not in the text tokenizer's vocabulary")
        names = recipe.data.masking.pair_text == 1  # captions that are hidden whole: many things have the same
        for part in ("images",) if names else ("captions", "images"):
            if row["kind"] != "text" and row["samples"] and (row[f"same_{part}"] or 0) > MOST_SAME:
                found.append(f"{where}: {row[f'same_{part}']:.0%} of the {part} occurred before")
        if (row["near_images"] or 0) > MOST_SAME:
            found.append(
                f"{where}: {row['near_images']:.0%} of the images are nearly the same as an earlier one, as "
                f"{' and '.join(row['near'])}"
            )
    for kind, held in report["held_out"].items():
        if held["samples"] < FEWEST:
            found.append(
                f"held-out {kind}: {held['samples']} samples are too few to tell much by; raise held_out of a source"
            )
        part = "captions" if kind == "text" else "images"
        if held[part]:
            found.append(f"held-out {kind}: {held[part]:.1%} of its different {part} are in training, too")
        if (held["near_images"] or 0) > MOST_NEAR:
            found.append(
                f"held-out {kind}: {held['near_images']:.1%} of its different images are nearly the same as one in "
                f"training, as {' and '.join(held['near'])}"
            )
    return found


# ---------------------------------------------------------------------------------------------------------- for people
_NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}  # eleven columns in eighty characters


def print_recipe_check(report: dict[str, Any], console: Console | None = None) -> None:
    """A report of `check_recipe` as tables and a verdict."""
    console = console or Console()
    table = Table(title=f"What {report['recipe'] or 'the recipe'} trains on", title_justify="left", **_NARROW)
    shown = ("kind", "share", "samples", "repeats", "bad", "cut", "unknown", "same text", "same image", "near")
    for column in ("", *shown):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for number, row in enumerate(report["sources"], 1):
        uncounted = ("unknown", "unknown") if row["stream"] else ("endless", "never")
        samples, repeats = uncounted if row["samples"] is None else (f"{row['samples']:,}", f"{row['repeats']:,.1f}")
        shares = (_percent(row[name]) for name in ("cut", "unknown", "same_captions", "same_images", "near_images"))
        first = (str(number), row["kind"], f"{row['share']:.0%}", samples, repeats, f"{row['bad']:,}")
        table.add_row(*first, *shares)
    console.print(table)
    for number, row in enumerate(report["sources"], 1):
        console.print(f"{number}: {row['name']}", markup=False, highlight=False, soft_wrap=True)
    console.print()
    held = Table(title="Held out, and how much of it is in training, too", title_justify="left", **_NARROW)
    for column in ("kind", "samples", "texts", "images", "near"):
        held.add_column(column, justify="left" if column == "kind" else "right")
    for kind, row in report["held_out"].items():
        shares = (_percent(row[name]) for name in ("captions", "images", "near_images"))
        held.add_row(kind, f"{row['samples']:,}", *shares)
    console.print(held)
    for line in [*report["understood"], *(f"problem: {line}" for line in report["problems"])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(
        "Look at the problems above before you train." if report["problems"] else "No problems: good to train on."
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
