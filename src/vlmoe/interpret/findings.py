"""Everything a report shows of a model in one plain dictionary: `find` for any subject (see `gather`), `find_run` and
`find_two` for our own runs, from their held-out data."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmoe.config import ModalityConfig, UserError, read_json
from vlmoe.data.downstream.loader import EvalData, count_of, open_split, splits_of
from vlmoe.data.loader import held_out, held_out_size
from vlmoe.data.sources import held_out_splits
from vlmoe.interpret.causal import ScoreOf, task_score
from vlmoe.interpret.gather import Progress, find, write
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recording import Recording, diff
from vlmoe.model import sizes
from vlmoe.model.device import pick_device
from vlmoe.tasks.downstream import Classifier
from vlmoe.tasks.export import Finetuned, Pretrained, load
from vlmoe.tasks.registry import collate_of
from vlmoe.train.runlog import ROUTING, read_lines

__all__ = ["about", "batches_of", "find", "find_run", "find_two", "history", "write"]

SAMPLES = 256
BATCH = 64
KINDS = ("pair", "image", "text")
MEASURES = ("max_load", "entropy", "churn", "dropped")
MOST_STEPS = 120  # of the history


def find_run(
    run: Path, samples: int = SAMPLES, shown: int = 12, *, split: str | None = None, ablate: bool = True,
    mode: str = "reroute", device: str = "auto", folder: Path | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The findings of a run. samples: held-out ones of each kind of data (of a fine-tuned run: of its task's split).
    split: None: the first. folder: where the recording is kept; None: nowhere. The rest is as `find`.

    Raises UserError: no such run or split, or a model without routers that choose.
    """
    trained = load(run, pick_device(device, "--device"))
    subject = OwnSubject(trained)
    if not subject.sites:
        raise UserError(f"{run}: {' '.join(subject.notes) or 'a dense model: no layer has a router'}")
    batches = list(batches_of(trained, samples, split))
    score: ScoreOf | None = None
    if isinstance(trained, Finetuned) and isinstance(trained.model, Classifier) and ablate:
        score = task_score(trained, split, samples)
    return find(
        subject, batches, title=run.resolve().name, about=about(trained, run), ablate=ablate, mode=mode, score=score,
        shown=shown, history=history(run), notes=_notes(trained), folder=folder, progress=progress,
    )  # fmt: skip


def find_two(a: Path, b: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The findings of two runs on the same data; the second's "drift" says how far their choices differ: site ->
    {"changed": share of tokens whose first expert has another number, "matched": the same after the best renumbering of
    experts, "tokens"}. None where the runs share no tokens or no site. options: of `find_run`, but for `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("a", "b")]
        found = [find_run(run, folder=folder, **options) for run, folder in zip((a, b), folders, strict=True)]
        try:
            drift = diff(*(Recording.load(folder) for folder in folders))
        except UserError:
            return found[0], found[1]
    found[1]["drift"] = {
        site: {"changed": d.first, "matched": d.first_matched, "tokens": d.tokens}
        for site, d in drift.items()
        if d.tokens
    }
    return found[0], found[1]


def batches_of(trained: Pretrained | Finetuned, samples: int = SAMPLES, split: str | None = None) -> Iterator[Any]:
    """Held-out batches with factors for an `OwnSubject`: of a pre-trained run `samples` of each kind it was trained on,
    hidden as in training; of a fine-tuned one, of its task's split. Raises UserError: no such split."""
    device = next(trained.model.parameters()).device
    if isinstance(trained, Finetuned):
        recipe = trained.recipe
        known = splits_of(recipe)
        _check(split, known)
        examples = open_split(recipe, split or known[0], trained.labels or None)
        count = min(samples, count_of(recipe, examples, split or known[0]))
        collate = collate_of(recipe, trained.labels, trained.text_tokenizer)
        data = EvalData(examples, collate, count, BATCH)
        yield from (step for step in map(data.__getitem__, range(len(data))) if step.batches)
        return
    plan = trained.recipe
    for kind in KINDS:
        if not getattr(plan.data.batch, kind):
            continue
        splits = held_out_splits(plan, kind)
        _check(split, splits)
        of = split or splits[0]
        count = min(samples, held_out_size(plan, of, kind))
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            yield held_out(plan, trained.text_tokenizer, of, kind, start, size, factors=True).to(device)


def _check(split: str | None, known: Any) -> None:
    if split is not None and split not in known:
        raise UserError(f"no split '{split}' in this run's data: there are {', '.join(known)}")


def about(trained: Pretrained | Finetuned, run: Path) -> dict[str, Any]:
    """A small table of what the run is."""
    recipe, size = trained.recipe, sizes(trained.recipe.model)
    sides = {side: getattr(recipe.model, side) for side in ("vision", "text")}
    found: dict[str, Any] = {
        "run": str(run),
        "recipe": recipe.name,
        "training": "pre-trained" if isinstance(trained, Pretrained) else f"fine-tuned for {recipe.task}",  # type: ignore[union-attr]
        "steps": recipe.train.steps,
        "parameters": size.params_total,
        "parameters per token": size.params_per_token,
        **{f"router, {name}": _router(side) for name, side in sides.items() if side.sparse != "none"},
    }  # fmt: skip
    found |= _scores(run / "eval.json")
    return found | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _router(side: ModalityConfig) -> str:
    m, shared = side.granularity, side.shared_experts
    said = f"{side.router.type}, {m * side.router.k} of {m * side.experts}"
    return said + (f" beside {shared} for all" if shared else "")


def _scores(path: Path) -> dict[str, Any]:
    """The main scores of the last evaluation, where there was one."""
    try:
        splits = read_json(path, nan=True)["splits"]
        name, first = next(iter(splits.items()))
        if "scores" in first:
            return {f"{name}: {key}": round(score["value"], 4) for key, score in first["scores"].items()}
        found = {}
        if "text" in first:
            found[f"{name}: hidden words, with the image"] = round(first["text"]["seen"]["accuracy"], 4)
        for split, scores in splits.items():
            if "names" in scores:
                found[f"{split}: names from sight"] = round(scores["names"]["seen"]["accuracy"], 4)
        if "image" in first:
            found[f"{name}: codes of hidden patches"] = round(first["image"]["accuracy"], 4)
        return found
    except (OSError, UserError, ValueError, KeyError, TypeError, StopIteration):
        return {}


def _notes(trained: Pretrained | Finetuned) -> list[str]:
    found = []
    fused = trained.recipe.model.vl_ffn
    if fused:
        found.append(
            f"In the top {fused} block{'s' if fused > 1 else ''} image-text pairs pass a dense layer: routers there "
            "decide only for images and texts that stand alone."
        )
    if isinstance(trained, Finetuned):
        found.append("The loss is that of an example's answer, and counts at its first token.")
    return found


def history(run: Path) -> dict[str, Any] | None:
    """Balance over training, from the run's log: {"steps", "sites": {site: {"share": [E] for each step, "max_load",
    "entropy", "churn", "dropped"}}}; None where the run kept none. The steps are those that the instruments looked at,
    or, where they hardly did, evenly chosen ones."""
    records = [r for r in read_lines(run / ROUTING) if r.get("load")]
    looked = [r for r in records if r.get("layers")]
    chosen = looked if len(looked) >= min(8, len(records)) else records
    chosen = chosen[:: -(-len(chosen) // MOST_STEPS) or 1]
    if not chosen:
        return None
    names = list(dict.fromkeys(name for r in chosen for name in r["load"]))
    sites: dict[str, Any] = {}
    for name in names:
        loads = [r["load"].get(name) for r in chosen]
        shares = [[x / max(sum(load), 1e-9) for x in load] if load else None for load in loads]
        layers = [(r.get("layers") or {}).get(name, {}) for r in chosen]
        sites[name] = {"share": shares} | {m: [layer.get(m) for layer in layers] for m in MEASURES}
        sites[name]["max_load"] = [max(s) * len(s) if s else None for s in shares]
    return {"steps": [r["step"] for r in chosen], "sites": sites}
