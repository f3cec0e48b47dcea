"""A first recipe for one's own data: sizes that fit what the data are like and what the machine can do.

It is a start, by rules of thumb that stand here and are said beside the keys; no run has shown it to be the best.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmoe.config import Recipe, RecipeError, UserError, load_recipe
from vlmoe.data.check_recipe import MOST_REPEATS
from vlmoe.data.survey import Survey, quantiles
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer, train_byte_pairs, train_wordpiece

MOST_BAD = 0.25  # share of samples that cannot be used; beyond it a run would look for good ones in vain
PASSES = 0.8 * MOST_REPEATS  # through the data at most, where time allows. Which samples are held out is told by hash,
# so training may see some fewer than are counted on here, each more often: still not so often that `data check` objects
STEPS = 200  # of training at least, as far as smaller batches make them of these passes
HELD_OUT, MOST_HELD_OUT, ENOUGH = 0.01, 0.1, 500  # share that training never sees: more of small data, for a score
BATCHES = (64, 32, 16, 8, 4)
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SPELLED = 2048  # vocabulary from which on letters without a token are spelled by bytes: an eighth of the rows at most
MOST_SCRIPTS = 5  # that are listed
NAME_WORDS = 3  # captions up to this median length are names: hidden as a whole, they can only be told from the image


@dataclass(frozen=True)
class Machine:
    """cuda: whether it has a CUDA device. memory: bytes, of that device or else of the computer."""

    cuda: bool
    cores: int
    memory: int


@dataclass(frozen=True)
class Size:
    """least: of samples for which it is meant."""

    least: int
    width: int
    depth: int
    heads: int


CPU_SIZES = (Size(1000, 128, 4, 8), Size(0, 64, 4, 4))
CUDA_SIZES = (Size(500_000, 768, 12, 12), Size(20_000, 384, 8, 6), Size(1000, 256, 6, 4), Size(0, 128, 4, 2))
CPU_IMAGES = ((64, 8), (48, 8), (32, 8))  # pixels along the edge of image and patch
CUDA_IMAGES = ((224, 16), (128, 16), (64, 8), (32, 8))
CPU_TEXT, CUDA_TEXT = 64, 128  # most tokens of a text


@dataclass
class Draft:
    """What is written. seconds: of a step, measured; 0: not yet."""

    name: str
    survey: Survey
    machine: Machine
    size: Size
    image_size: int
    patch: int
    max_text: int
    vocabulary: int
    tokens: list[int]
    batch: int = BATCHES[0]
    steps: int = 100
    seconds: float = 0.0

    @property
    def byte_fallback(self) -> bool:
        return self.vocabulary >= SPELLED

    @property
    def kind(self) -> str:
        return self.survey.kind


def this_machine() -> Machine:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        return Machine(True, cores, torch.cuda.mem_get_info()[0])
    return Machine(False, cores, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def new_recipe(
    found: Survey,
    out: Path,
    minutes: float = 30,
    machine: Machine | None = None,
    measure: Callable[[Recipe, Survey], float] | None = None,
) -> Draft:
    """Write a recipe for surveyed data to `out`, whose training takes about `minutes` at most.

    measure: gives the seconds of a recipe's step; None: training a few steps here does.

    Raises UserError: `out` is there already or cannot be written, too much of the data cannot be used.
    """
    refuse_to_overwrite(out)
    if found.bad_share > MOST_BAD:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.bad.most_common())
        raise UserError(
            f"{found.path}: {found.bad.total()} of {found.looked_at} samples cannot be used ({reasons}), more than a "
            f"run puts up with; the first: {found.first_bad}. vlmoe data check shows more; --kind image reads no "
            "captions"
        )
    from vlmoe.model import account

    draft = _draft(found, machine or this_machine(), _name(found.path))
    shown = PASSES * _trained(found)
    for size in [b for b in BATCHES if b <= max(BATCHES[-1], shown / STEPS)]:
        draft.batch = size
        recipe = _load(draft, out)
        if account(recipe).memory.peak <= draft.machine.memory / 2:
            break
    draft.seconds = (measure or seconds_of_a_step)(recipe, found)
    fits = minutes * 60 / draft.seconds
    draft.steps = _two_digits(max(1, min(shown / draft.batch, max(50, fits))))
    _load(draft, out)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(as_yaml(draft, out))
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    return draft


def refuse_to_overwrite(out: Path) -> None:
    if out.suffix not in {".yaml", ".yml"}:
        raise UserError(f"--out got {out}, wanted a file named .yaml")
    if not str(out).isprintable():
        raise UserError(f"--out got {str(out)!r}, wanted a name that can be printed")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: is there already, and is not overwritten; name another file with --out")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}")


def _draft(found: Survey, machine: Machine, name: str) -> Draft:
    sizes = CUDA_SIZES if machine.cuda else CPU_SIZES
    images = CUDA_IMAGES if machine.cuda else CPU_IMAGES
    (side,) = quantiles(found.sides, 0.5)
    image_size, patch = next((pair for pair in images if pair[0] <= side), images[-1])
    size = next(s for s in sizes if found.samples >= s.least)
    if found.kind == "image":
        return Draft(name, found, machine, size, image_size, patch, 8, VOCABULARIES[0], [])
    letters = len(set("".join(found.texts).lower()))
    words = train_wordpiece(found.texts, max(8192, 4 * letters))
    needed = max(1.25 * words.size, 4 * letters)
    vocabulary = next((v for v in VOCABULARIES if v >= needed), VOCABULARIES[-1])
    if vocabulary >= SPELLED:
        words = train_byte_pairs(found.texts, vocabulary)
    tokens = [len(ids) for ids, _ in words.encode_batch(found.texts)]
    (long,) = quantiles(tokens, 0.99)
    most = CUDA_TEXT if machine.cuda else CPU_TEXT
    max_text = min(most, max(8, 4 * math.ceil((long + 2) / 4)))
    return Draft(name, found, machine, size, image_size, patch, max_text, vocabulary, tokens)


def _held_out(found: Survey) -> float:
    return min(MOST_HELD_OUT, max(HELD_OUT, math.ceil(100 * ENOUGH / found.samples) / 100))


def _trained(found: Survey) -> float:
    """How many samples training sees, about: one is held out at least."""
    return max(1, min(found.samples - 1, found.samples * (1 - _held_out(found))))


def _name(path: str) -> str:
    """Of the run, from the data's path: the last part of it that is no pattern. One whose folder is not there yet."""
    plain = Path(re.split(r"[*?\[{]", path)[0].rstrip("/"))
    parts = [plain.name.removesuffix(".tar").removesuffix(".parquet"), plain.absolute().parent.name]
    named = [re.sub(r"[^\w.-]+", "-", part).strip("-_.") for part in parts]
    name = next((part for part in named if part), "mine")
    tried = [name, *(f"{name}-{n}" for n in range(2, 1000))]
    return next((each for each in tried if not Path("runs", each).exists()), name)


def _load(draft: Draft, out: Path) -> Recipe:
    """The draft as a run would read it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        try:
            file.write_text(as_yaml(draft, out), encoding="utf-8")
            return load_recipe(str(file))
        except UnicodeEncodeError:
            raise UserError(f"{draft.survey.path!r}: a path that is no text cannot stand in a recipe") from None
        except RecipeError as error:  # a path with "${" in it, for one
            raise UserError(str(error).replace(str(file), str(out))) from None


def seconds_of_a_step(recipe: Recipe, found: Survey) -> float:
    """Of training on this machine, or of reading its data, whichever takes longer. The tokenizers are stand-ins of the
    same size."""
    from vlmoe.data.loader import StepData
    from vlmoe.data.visual_tokenizer import VQTokenizer
    from vlmoe.study.measure import ReadyModel

    m, config = recipe.model, recipe.data.visual_tokenizer
    train = train_byte_pairs if recipe.data.text_tokenizer.byte_fallback else train_wordpiece
    text: TextTokenizer = train(found.texts, m.vocabulary) if found.texts else build_text_tokenizer(recipe)
    visual = VQTokenizer(m.image_size, m.patch, m.codes, config.dim, config.width)
    data = StepData(recipe, text)
    began = time.perf_counter()
    data[4]
    reading = (time.perf_counter() - began) / max(1, recipe.data.workers)
    ready = ReadyModel(recipe, text, visual)
    ready.step(0)
    return max(reading, min(ready.timed_step(n) for n in (1, 2)))


def _two_digits(steps: float) -> int:
    unit = 10 ** max(0, len(str(int(steps))) - 2)
    return int(steps // unit) * unit


# ------------------------------------------------------------------------------------------------------------- written
def as_yaml(draft: Draft, out: Path) -> str:
    f, m, pairs = draft.survey, draft.machine, draft.kind == "pair"
    names = pairs and _median(f.words) <= NAME_WORDS
    columns = "".join(
        f", {key}: {json.dumps(value, ensure_ascii=False)}"
        for key, value, usual in (("image_column", f.image_column, "image"), ("text_column", f.text_column, "text"))
        if value != usual
    )
    path = json.dumps(os.path.abspath(f.path), ensure_ascii=False)
    codes = 1024 if f.samples * (draft.image_size // draft.patch) ** 2 >= 50_000 else 256
    rate = 2e-3 * min(1.0, math.sqrt(128 / draft.size.width))
    workers = max(1, min(4, m.cores // 2))
    bad = min(0.5, max(0.01, math.ceil(200 * f.bad_share) / 100))
    held_out = _held_out(f)
    said = f", held_out: {held_out}" if held_out != HELD_OUT else ""
    lines = [
        f"# A first recipe for {f.samples:,} {'pairs' if pairs else 'images'}, by vlmoe new.",
        *(f"# {line}" for line in describe(draft)),
        f"# Train: vlmoe pretrain {out}",
        f"# Samples as the model sees them: vlmoe data show {out}",
        "# Every key: vlmoe recipe keys",
        "like: demo  # what is not said here is the demo's: optimiser, routers, sixteen experts beside two shared ones",
        f"name: {json.dumps(draft.name, ensure_ascii=False)}  # the run's folder is runs/NAME",
        "model:",
        f"  width: {draft.size.width}  # larger models want more data and time",
        f"  depth: {draft.size.depth}",
        f"  heads: {draft.size.heads}",
        f"  image_size: {draft.image_size}  # pixels; images are cut to a square and resized",
        f"  patch: {draft.patch}",
        f"  codes: {codes}  # of the visual tokenizer, which is trained first",
        f"  max_text: {draft.max_text}"
        + (f"  # tokens; {_cut(draft)} of the captions are longer and cut" if pairs else ""),
        f"  vocabulary: {draft.vocabulary}",
        "  vl_ffn: 0  # " + ("above 0, experts in the top blocks would meet no pair" if pairs else "for pairs alone"),
        "data:",
        "  sources:",
        f"    - {{type: {f.type}, kind: {draft.kind}, path: {path}{columns}{said}}}",
        f"  # held out, never trained on: about {held_out * f.samples:,.0f} samples, for the scores",
        f"  batch: {{{draft.kind}: {draft.batch}}}",
        "  masking:",
        *(
            [
                f"    pair_text: {1 if names else 0.5}  # share of a caption that is hidden"
                + (": all of it, as captions are names" if names else ""),
                "    pair_patches: 0.25  # share of the image that is hidden",
            ]
            if pairs
            else ["    patches: 0.4  # share of the image that is hidden"]
        ),
        *(
            [
                f"  text_tokenizer: {{type: corpus, samples: 20000, byte_fallback: {str(draft.byte_fallback).lower()}}}"
                + ("  # trained on the captions; " + _letters(draft))
            ]
            * pairs
        ),
        f"  visual_tokenizer: {{steps: {300 if f.samples < 1000 else 900}}}",
        f"  workers: {workers}",
        f"  max_bad_share: {bad}  # {f.bad_share:.1%} of the samples looked at cannot be used",
        "train:",
        f"  steps: {draft.steps}" + _time(draft),
        f"  lr: {rate:.2g}",
        f"  warmup: {min(draft.steps // 2, max(10, min(1000, draft.steps // 20)))}",
        f"  checkpoint_every: {max(50, draft.steps // 4)}",
        "eval: {samples: 512}  # of those held out, at most",
    ]
    return "\n".join(lines) + "\n"


def describe(draft: Draft) -> list[str]:
    """What was found, in sentences for people."""
    f = draft.survey
    low, middle, high = quantiles(f.sides, 0, 0.5, 1)
    lines = [
        f"Looked at {f.looked_at:,} of {f.samples:,} samples; {f.bad.total():,} cannot be used"
        + (f": {', '.join(f'{count:,} {reason}' for reason, count in f.bad.most_common(3))}." if f.bad else "."),
        f"Images: shorter side {low} to {high} pixels, median {middle}."
        if low < high
        else f"Images: shorter side {low} pixels.",
    ]
    if draft.kind == "image":
        return [*lines, f"No captions: none beside the images, in a table, or under the key '{f.text_column}'."]
    words, tokens = quantiles(f.words, 0.5, 1), quantiles(draft.tokens, 0.5, 1)
    same = 1 - len(set(f.texts)) / len(f.texts)
    return [
        *lines,
        f"Captions: median {words[0]} words ({tokens[0]} tokens), at most {words[1]} ({tokens[1]}); {same:.0%} repeat "
        "an earlier one.",
        f"Their letters: {_scripts(f)}.",
    ]


def _letters(draft: Draft) -> str:
    return "unknown letters become bytes" if draft.byte_fallback else f"bytes need 256 rows: not below {SPELLED}"


def _scripts(found: Survey) -> str:
    """ "Latin", or "91% Latin, 9% Greek"; of many the most frequent."""
    scripts = list(found.scripts().items())
    if len(scripts) < 2:
        return scripts[0][0] if scripts else "none"
    return ", ".join(f"{max(0.001, share):.1%} {name}" for name, share in scripts[:MOST_SCRIPTS])


def _median(values: list[int]) -> int:
    return quantiles(values, 0.5)[0]


def _cut(draft: Draft) -> str:
    return f"{sum(n > draft.max_text - 2 for n in draft.tokens) / len(draft.tokens):.1%}"


def _time(draft: Draft) -> str:
    if not draft.seconds:
        return ""
    passes = draft.steps * draft.batch / _trained(draft.survey)
    took = draft.steps * draft.seconds
    clock = f"{took / 60:.0f} min" if took >= 90 else f"{took:.0f} s"
    where = "on this GPU" if draft.machine.cuda else f"on these {draft.machine.cores} cores"
    return f"  # {passes:.3g} passes; about {clock} after the tokenizers: {draft.seconds:.2g} s a step {where}"
