"""Fine-tuning from a recipe: a pre-trained backbone, a task's head, the loop, then the best weights as plain files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from vlmoe.config import FinetuneRecipe, UserError
from vlmoe.data.check_recipe import MOST_CUT, MOST_UNKNOWN
from vlmoe.data.downstream.example import Examples
from vlmoe.data.downstream.loader import EvalData, TrainData, count_of, open_split, splits_of
from vlmoe.distributed import Ranks, joined
from vlmoe.model.device import pick_device
from vlmoe.tasks.answer import answer_all
from vlmoe.tasks.base import Task
from vlmoe.tasks.downstream import Downstream
from vlmoe.tasks.export import Finetuned, Pretrained, export, load
from vlmoe.tasks.finite import NotFinite
from vlmoe.tasks.init import start_from
from vlmoe.tasks.registry import READS, build_task, collate_of
from vlmoe.train import checkpoint
from vlmoe.train.given import check_given_files
from vlmoe.train.judge import Validation
from vlmoe.train.loop import TrainResult, check_ranks, train
from vlmoe.train.pretrain import MODEL, TOKENIZERS
from vlmoe.train.runlog import CHECKPOINTS, lock_run

LOOKED_AT = 1000  # examples, for what of their texts is not read
VALIDATIONS = 10  # in a run, where the recipe does not say


def finetune(recipe: FinetuneRecipe, console: Console | None = None) -> TrainResult:
    """Run a recipe to its end, or on from its last checkpoint.

    Writes into run.dir what pre-training writes, and best/: the weights of the best validation, which model/ holds in
    the end.

    Raises UserError: the run to start from is no model or does not fit, the task's data is unusable, and all that
    `train` raises.
    """
    device = pick_device(recipe.train.device)
    with joined(device) as ranks:
        return _finetune(recipe, device, ranks, console or Console(quiet=not ranks.first))


def _finetune(recipe: FinetuneRecipe, device: torch.device, ranks: Ranks, console: Console) -> TrainResult:
    run_dir = Path(recipe.run.dir)
    check_ranks(recipe.train, ranks.world)
    start = load(recipe.init)
    unseen = _fits(recipe, start)
    examples = open_split(recipe, "train")
    first = splits_of(recipe)[0]
    judged = open_split(recipe, first, examples.labels or None)
    check_given_files(recipe.data)
    recipe = with_steps(recipe, examples)
    with lock_run(run_dir, ranks.first):
        found = checkpoint.newest(run_dir / CHECKPOINTS)
        if found is not None:
            checkpoint.check_recipe(found, recipe)
        if ranks.first:
            start.text_tokenizer.save(run_dir / TOKENIZERS)
        torch.manual_seed(recipe.seed)
        task = build_task(recipe, examples.labels, start.text_tokenizer)
        if not recipe.train.scratch:
            start_from(task, start.model, recipe.train.fresh)
        task.freeze()
        collate = collate_of(recipe, examples.labels, start.text_tokenizer)
        count = min(count_of(recipe, judged, first), recipe.eval.validate)
        validation = Validation(
            _judge(EvalData(judged, collate, count, recipe.eval.batch), device, recipe.data.workers),
            every=recipe.train.validate_every or max(1, recipe.train.steps // VALIDATIONS),
            patience=recipe.train.patience,
        )
        known = len(examples) < 1 << 40
        unanswerable = getattr(examples, "unanswerable", 0)
        console.print(
            f"{recipe.task} from {'random weights' if recipe.train.scratch else recipe.init}: "
            + (f"{count_of(recipe, examples, 'train'):,} training examples" if known else "endless training examples")
            + (f", {len(examples.labels)} classes" if examples.labels else "")
            + (f", {unanswerable:,} of them with no answer among these" if unanswerable else "")
            + f"; {type(task).main} on {count} of '{first}' picks the best weights",
            highlight=False, markup=False,
        )  # fmt: skip
        for line in warnings_of(recipe, start, examples):
            console.print(line, markup=False, highlight=False, soft_wrap=True, style="yellow")
        for part in unseen:
            console.print(f"{recipe.init} has seen no {part}: what reads them starts from random weights", markup=False)
        result = train(recipe, task, TrainData(recipe, examples, collate), run_dir, validation)
        if not result.stopped and ranks.first:
            export(task, recipe, run_dir / TOKENIZERS, run_dir / MODEL, examples.labels)
    return result


def warnings_of(recipe: FinetuneRecipe, start: Pretrained | Finetuned, examples: Examples) -> list[str]:
    """For people: what of the task's data is strange to the run that it starts from. Of texts in files the first
    `LOOKED_AT` examples are looked at."""
    found = []
    if recipe.data.type == "world" and not recipe.train.scratch and not _knows_world(start):
        found.append(
            f"{recipe.init} has never seen the embedded world, which this task asks about: its pictures and many of "
            "its words are new to the model. For your own questions set data.type=files, see docs/finetune.md"
        )
    if recipe.data.type == "world" or "texts" not in READS[recipe.task]:
        return found
    truths = [examples.truth(i) for i in range(min(len(examples), LOOKED_AT))]
    written = recipe.task in {"retrieval", "caption"}  # the references are texts to read; vqa's are answers to choose
    texts = [text for e in truths for text in (e.references if written else (e.text, e.text_pair)) if text]
    unk, rows = start.text_tokenizer.unk_id, [ids for ids, _ in start.text_tokenizer.encode_batch(texts)]
    most = recipe.model.max_text - 2  # beside start and end
    cut, longest = sum(len(ids) > most for ids in rows), max(map(len, rows), default=0)
    tokens, unknown = sum(map(len, rows)), sum(i == unk for ids in rows for i in ids)
    if cut > MOST_CUT * len(rows):
        found.append(
            f"{cut / len(rows):.0%} of the texts are cut at model.max_text={most + 2} tokens; the longest needs "
            f"model.max_text={longest + 2}"
        )
    if unknown > MOST_UNKNOWN * tokens:
        found.append(
            f"{unknown / tokens:.1%} of the tokens in these texts are not in the vocabulary of {recipe.init}, "
            "which was made of other texts"
        )
    return found


def _knows_world(start: Pretrained | Finetuned) -> bool:
    """Whether a run has seen the embedded world; of a fine-tuned one, at least its task."""
    if isinstance(start, Finetuned):
        return start.recipe.data.type == "world"
    batch = vars(start.recipe.data.batch)
    return any(source.type == "world" and batch[source.kind] for source in start.recipe.data.sources)


def _fits(recipe: FinetuneRecipe, start: Pretrained | Finetuned) -> list[str]:
    """Of "images" and "texts", what the task reads and the run to start from has not seen.

    Raises UserError: the task reads texts, and the run's tokenizer knows no words. Or the run has seen nothing of what
    the task reads, so that nothing would be gained from it.
    """
    reads = READS[recipe.task]
    if "texts" in reads and not start.text_tokenizer.knows_words:
        raise UserError(
            f"{recipe.init}: has read no texts, so its tokenizer knows no words, and {recipe.task} needs them: "
            "pre-train with texts or pairs in data.batch, or with a data.text_tokenizer.path"
        )
    if recipe.train.scratch or isinstance(start, Finetuned):
        return []
    seen = {"images": start.recipe.reads_images, "texts": start.recipe.reads_texts}
    unseen = [part for part in reads if not seen[part]]
    if len(unseen) == len(reads):
        raise UserError(
            f"{recipe.init}: has seen no {unseen[0]}, and {recipe.task} reads nothing else: start from a run that has, "
            "or from random weights with train.scratch=true"
        )
    return unseen


def with_steps(recipe: FinetuneRecipe, examples: Examples) -> FinetuneRecipe:
    """The recipe with `epochs` and `warmup_epochs` turned into steps."""
    recipe = copy.deepcopy(recipe)
    t = recipe.train
    per_epoch = count_of(recipe, examples, "train") / (recipe.data.batch * t.accumulate)
    for epochs, name in ((t.epochs, "steps"), (t.warmup_epochs, "warmup")):
        if epochs is not None:
            if len(examples) >= 1 << 40 and recipe.data.limit is None:
                raise UserError(f"key 'train.epochs': this data is endless; give train.{name}, or set data.limit")
            setattr(t, name, max(1, math.ceil(epochs * per_epoch)))
    return recipe


def _judge(data: EvalData, device: torch.device, workers: int) -> Callable[[Task], float]:
    def score(task: Task) -> float:
        assert isinstance(task, Downstream)
        try:
            scores = answer_all(task, data, device, workers).scores(task)
        except NotFinite as error:
            raise UserError(f"{data.examples.name}: {error}") from None
        if type(task).main not in scores or scores[type(task).main].n == 0:
            raise UserError(f"{data.examples.name}: no example can be scored, so no weights can be chosen by it")
        return scores[type(task).main].value

    return score
