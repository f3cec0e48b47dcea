"""Pre-training from a recipe: tokenizers first, then the loop, then the weights as plain files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vlmoe.config import Recipe, UserError
from vlmoe.data.loader import StepData, held_out, make_loader
from vlmoe.data.text_tokenizer import DESCRIPTION, TextTokenizer, build_text_tokenizer, load_text_tokenizer
from vlmoe.data.visual_tokenizer import VisualTokenizer, VQTokenizer
from vlmoe.data.visual_training import train_vq
from vlmoe.distributed import Ranks, joined
from vlmoe.model import describe
from vlmoe.model.device import pick_device
from vlmoe.model.parameters import sparse_layers
from vlmoe.tasks.export import Pretrained, export, load_pretrained, load_visual_tokenizer
from vlmoe.tasks.init import continue_from
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.tasks.upcycling import Upcycled, fill_experts
from vlmoe.train import checkpoint
from vlmoe.train.branch import branch_off
from vlmoe.train.given import check_given
from vlmoe.train.loop import TrainResult, check_ranks, train
from vlmoe.train.runlog import CHECKPOINTS, lock_run, note_event
from vlmoe.train.validation import held_out_validation

TOKENIZERS, MODEL = "tokenizers", "model"
STREAM = "stream"  # what readers of streams have found, see `vlmoe.data.stream`
MEASURED = 8  # samples of each kind on which a filled model is compared with the dense one


def pretrain(recipe: Recipe, console: Console | None = None) -> TrainResult:
    """Run a recipe to its end, or on from its last checkpoint.

    Writes into run.dir: tokenizers/, checkpoints/, logs, plots and, at the end, model/ (see `vlmoe.load`).

    Raises UserError: a file or folder that the recipe names is not there, or the run to start from does not fit, both
    before run.dir is made; a tokenizer or the data cannot be used; and all that `train` raises.
    """
    device = pick_device(recipe.train.device)
    with joined(device) as ranks:
        return _pretrain(recipe, device, ranks, console or Console(quiet=not ranks.first))


def _pretrain(recipe: Recipe, device: torch.device, ranks: Ranks, console: Console) -> TrainResult:
    run_dir = Path(recipe.run.dir)
    check_ranks(recipe.train, ranks.world)
    console.print(describe(recipe.name, recipe.model), highlight=False, markup=False)
    if dense := why_dense(recipe):
        console.print(dense, highlight=False, markup=False, soft_wrap=True, style="yellow")
    check_given(recipe, run_dir)
    start = None
    if recipe.init and checkpoint.newest(run_dir / CHECKPOINTS) is None:
        start = load_pretrained(recipe.init)
        task, upcycled = _continued(start, recipe, console)  # before anything is written: it may not fit
    # from here on: two launches must not train the same tokenizers either
    with lock_run(run_dir, ranks.first):
        with ranks.first_alone():
            found = checkpoint.newest(run_dir / CHECKPOINTS)
            if found is None and recipe.branch_from:
                found = branch_off(recipe, run_dir, [TOKENIZERS, STREAM])
            if found is not None:  # before the tokenizers, which belong to the recipe as well
                checkpoint.check_recipe(found, recipe)
                start = None
            if start is not None:
                _take_tokenizers(start, recipe, run_dir / TOKENIZERS)
            text_tokenizer = prepare_text_tokenizer(recipe, run_dir / TOKENIZERS, console)
            visual_tokenizer = prepare_visual_tokenizer(recipe, text_tokenizer, run_dir / TOKENIZERS, device, console)
        if start is not None:
            _check_tokenizers(start, text_tokenizer, visual_tokenizer)
            task.use(visual_tokenizer)  # the run to start from may have had none
            if upcycled is not None and ranks.first:
                note_event(run_dir, "upcycled", init=recipe.init, **vars(upcycled))
        else:
            torch.manual_seed(recipe.seed)
            task = MaskedDataModelling(recipe.model, visual_tokenizer)
        del start  # its weights are copied: they need no memory while training
        data = StepData(recipe, text_tokenizer, record=run_dir / STREAM)
        validation = held_out_validation(recipe, text_tokenizer, device)
        for line in data.understood():
            console.print(line, highlight=False, markup=False)
        for line in data.warnings():
            console.print(line, highlight=False, markup=False, soft_wrap=True, style="yellow")
        result = train(recipe, task, data, run_dir, validation)
        if not result.stopped and ranks.first:
            export(task, recipe, run_dir / TOKENIZERS, run_dir / MODEL)
    return result


def why_dense(recipe: Recipe) -> str:
    """For people: why no token of a run meets an expert; "" where some do."""
    m, batch = recipe.model, vars(recipe.data.batch)
    if sparse_layers(m, [kind for kind, size in batch.items() if size]):
        return ""
    if not sparse_layers(replace(m, vl_ffn=0), batch):
        return (
            f"This model is dense: it has no sparse layer, as model.vision.sparse is {m.vision.sparse} and "
            f"model.text.sparse {m.text.sparse} with model.depth={m.depth}."
        )
    return (
        "No token of this run meets an expert: the model has sparse layers, but none where these samples pass "
        "(data.batch says which there are; in the top model.vl_ffn blocks pairs pass a dense layer)."
    )


def _continued(start: Pretrained, recipe: Recipe, console: Console) -> tuple[MaskedDataModelling, Upcycled | None]:
    """The recipe's model with the weights of the run to start from, and how near it is to that one where experts were
    filled: measured on the first samples of the run."""
    torch.manual_seed(recipe.seed)
    task = MaskedDataModelling(recipe.model, start.visual_tokenizer)
    layers = continue_from(task, start.model)
    console.print(f"weights of {recipe.init}", highlight=False, markup=False)
    if not layers:
        return task, None
    first = StepData(recipe, start.text_tokenizer)[0].batches
    first = {kind: batch.head(MEASURED) for kind, batch in first.items()}
    upcycled = fill_experts(task, start.model, layers, first, recipe.init_allow_inexact)
    filled = f"experts of {len(layers)} layers filled from dense ones; {upcycled}"
    console.print(filled, highlight=False, markup=False)
    return task, upcycled


def _take_tokenizers(start: Pretrained, recipe: Recipe, folder: Path) -> None:
    """Those of the run to start from, unless the run has some or its recipe names others."""
    visual = start.visual_tokenizer
    if (
        recipe.predicts_patches
        and isinstance(visual, VQTokenizer)
        and not recipe.data.visual_tokenizer.path
        and not (folder / "visual.json").exists()
    ):
        visual.save(folder)
    if start.recipe.reads_texts and not recipe.data.text_tokenizer.path and not (folder / DESCRIPTION).exists():
        start.text_tokenizer.save(folder)


def _check_tokenizers(start: Pretrained, text: TextTokenizer, visual: VisualTokenizer | None) -> None:
    """Raises UserError where words or codes have other numbers than those the weights have learned. A run that saw no
    texts has learned none, and one that saw no images no codes."""
    words = [[t.decode([i]) for i in range(t.size)] for t in (start.text_tokenizer, text)]
    if start.recipe.reads_texts and words[0] != words[1]:
        raise UserError(f"init={start.path}: the text tokenizer there is not this run's, so words would be mistaken")
    if start.visual_tokenizer is None or visual is None:
        return
    then, now = (v.state_dict() if isinstance(v, VQTokenizer) else {} for v in (start.visual_tokenizer, visual))
    if then.keys() != now.keys() or not all(torch.equal(now[name].cpu(), then[name].cpu()) for name in now):
        raise UserError(f"init={start.path}: the visual tokenizer there is not this run's, so codes would be mistaken")


def prepare_text_tokenizer(recipe: Recipe, folder: Path, console: Console) -> TextTokenizer:
    """The run's text tokenizer: made or read once, then kept with the run."""
    if (folder / DESCRIPTION).is_file():
        return load_text_tokenizer(folder)
    tokenizer = build_text_tokenizer(recipe)
    tokenizer.save(folder)
    added = f", added: {', '.join(tokenizer.added)}" if tokenizer.added else ""
    console.print(f"text tokenizer: {tokenizer.type}, {tokenizer.size} tokens{added}", highlight=False, markup=False)
    return tokenizer


def prepare_visual_tokenizer(
    recipe: Recipe, text_tokenizer: TextTokenizer, folder: Path, device: torch.device, console: Console
) -> VisualTokenizer | None:
    """The run's visual tokenizer: trained on the run's own images or read once, then kept with the run. None where it
    predicts no patches."""
    config = recipe.data.visual_tokenizer
    if recipe.predicts_patches and config.type == "vq" and not (folder / "visual.json").is_file():
        if config.path:
            tokenizer = VQTokenizer.load(Path(config.path))
        else:
            kind = "image" if recipe.data.batch.image else "pair"
            tokenizer = _train_visual_tokenizer(recipe, text_tokenizer, kind, device, console)
        tokenizer.save(folder)
    return load_visual_tokenizer(folder, recipe)


def _train_visual_tokenizer(
    recipe: Recipe, text_tokenizer: TextTokenizer, kind: str, device: torch.device, console: Console
) -> VQTokenizer:
    config = recipe.data.visual_tokenizer
    unseen = held_out(recipe, text_tokenizer, "val", kind, 0, min(256, recipe.eval.samples)).image_BCHW
    assert unseen is not None
    columns = (
        TextColumn("visual tokenizer"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=config.steps, loss=float("nan"))
        tokenizer, report = train_vq(
            config,
            recipe.model,
            _images(recipe, text_tokenizer, kind, device),
            unseen,
            recipe.seed,
            device,
            progress=lambda step, loss: bar.update(task, completed=step, loss=loss),
        )
    used, explained = 100 * report["used"], 100 * (1 - report["unexplained"])
    console.print(
        f"visual tokenizer: {recipe.model.codes} codes, on held-out images {used:.0f}% in use "
        f"(perplexity {report['perplexity']:.0f}) and {explained:.0f}% of the pixels' variance explained",
        highlight=False,
    )
    console.print(
        f"visual tokenizer: the best code leads the second by a cosine of {report['gap']:.3f} (median); "
        f"{100 * report['tied_bf16']:.1f}% of patches are nearer to a tie than bfloat16's rounding, "
        f"{100 * report['tied_fp32']:.1f}% than float32's, in which they are encoded",
        highlight=False,
    )
    return tokenizer


def _images(recipe: Recipe, text_tokenizer: TextTokenizer, kind: str, device: torch.device) -> Iterator[Tensor]:
    """Batches of the run's own images, from the same sources and in the same order as training draws them."""
    config = recipe.data.visual_tokenizer
    alone = copy.deepcopy(recipe)
    alone.data.batch.pair = alone.data.batch.text = alone.data.batch.image = 0
    setattr(alone.data.batch, kind, config.batch)
    for step in make_loader(StepData(alone, text_tokenizer), 0, config.steps, min(recipe.data.workers, 1), device):
        image = step.batches[kind].image_BCHW
        assert image is not None
        yield image
