"""One answer of a fine-tuned model to anyone's images and texts, with the experts that served it.

Shape suffixes: E experts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor, nn

from vlmoe.config import AlteredError, UserError
from vlmoe.data.downstream.collate import Prepare
from vlmoe.data.downstream.example import Example
from vlmoe.data.images import SUFFIXES, decode_image
from vlmoe.data.sample import BadSample
from vlmoe.data.tensors import load_sealed_tensors, save_sealed_tensors
from vlmoe.model.device import pick_device
from vlmoe.moe import MoELayer, RoutingStats
from vlmoe.tasks.export import WEIGHTS, Finetuned, load_finetuned
from vlmoe.tasks.finite import NotFinite
from vlmoe.tasks.registry import collate_of
from vlmoe.tasks.retrieval import Retrieval

NEEDS = {  # images, texts
    "vqa": (1, 1), "nlvr2": (2, 1), "classify": (1, 0), "nli": (0, 2), "caption": (1, 0),
}  # fmt: skip
WORDS = {
    "vqa": "one --image and the question as --text",
    "nlvr2": "two --image, left and right, and the sentence as --text",
    "classify": "one --image",
    "nli": "two --text, premise and hypothesis",
    "caption": "one --image",
    "retrieval": "a folder of images as --image and what to find as --text, or one --image and several --text",
}
TOP = 10  # of a search
BATCH = 64
CACHE = "embeddings"


def predict(run: Path, task: str, images: Sequence[Path], texts: Sequence[str], device: str = "auto") -> dict[str, Any]:
    """{"task", "answers": best first, each with its "answer" and "probability" (of a search: "similarity"),
    "experts": "block/modality" -> share of the tokens that each expert took}.

    Raises UserError: the run is of another task, too many or few images or texts, an image that cannot be read,
    an answer of nan or infinity.
    """
    where = pick_device(device, "--device")
    trained = load_finetuned(run, task, where)
    with record_load(trained.model) as load:
        if task == "retrieval":
            answers = _search(trained, images, texts, where, run)
        else:
            wanted = NEEDS[task]
            if (len(images), len(texts)) != wanted:
                raise UserError(f"{task} takes {WORDS[task]}; got {len(images)} --image and {len(texts)} --text")
            answers = _answer(trained, images, texts, where)
    return {"task": task, "answers": answers, "experts": load}


def _answer(trained: Finetuned, images: Sequence[Path], texts: Sequence[str], device: torch.device) -> Any:
    example = Example(
        "input", tuple(read_image(path, trained) for path in images), texts[0] if texts else None,
        texts[1] if len(texts) > 1 else None,
    )  # fmt: skip
    collate = collate_of(trained.recipe, trained.labels, trained.text_tokenizer)
    batches = collate([example], [np.random.default_rng(0)], False)
    answer = trained.model.predict({kind: batch.to(device) for kind, batch in batches.items()})[0]
    if not answer.finite:
        raise NotFinite(1, 1, "answers")
    return trained.model.show(answer)


def read_image(path: Path, trained: Finetuned) -> np.ndarray:
    """uint8 (S, S, 3). Raises UserError naming the file."""
    try:
        return decode_image(
            path.read_bytes(), str(path), trained.recipe.model.image_size, trained.recipe.data.max_pixels
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except BadSample as error:
        raise UserError(f"{error.key}: {error.reason}") from None


# -------------------------------------------------------------------------------------------------------------- search
def _search(
    trained: Finetuned, images: Sequence[Path], texts: Sequence[str], device: torch.device, run: Path
) -> list[dict[str, Any]]:
    model = trained.model
    assert isinstance(model, Retrieval)
    prepare = Prepare(trained.recipe.model, trained.text_tokenizer)
    paths = [p for path in images for p in (_images_below(path) if path.is_dir() else [path])]
    if not paths or not texts or (len(paths) > 1 and len(texts) > 1):
        raise UserError(
            f"retrieval takes {WORDS['retrieval']}; got {len(paths)} images in {len(images)} --image and "
            f"{len(texts)} --text"
        )
    image_ND = embed_images(model, trained, paths, device, run)
    batch = prepare.texts(list(texts), list(texts)).to(device)
    with torch.no_grad():
        text_MD = model.embed_texts(batch).cpu()
    similarity = (image_ND @ text_MD.T).flatten()
    if broken := int((~similarity.isfinite()).sum()):
        raise NotFinite(broken, len(similarity), "similarities")
    names = [str(p) for p in paths] if len(texts) == 1 else list(texts)
    best = similarity.argsort(descending=True, stable=True)[:TOP].tolist()
    probability = (model.log_scale.detach().exp().cpu() * similarity).softmax(dim=0)
    return [
        {"answer": names[i], "probability": float(probability[i]), "similarity": float(similarity[i])} for i in best
    ]


def _images_below(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower().removeprefix(".") in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"folder {folder}: no images ({', '.join(SUFFIXES)}) below it")
    return found


def embed_images(
    model: Retrieval, trained: Finetuned, paths: Sequence[Path], device: torch.device, run: Path
) -> Tensor:
    """(N, D) unit vectors of image files. Kept in the run's folder `embeddings`, one file for each list of images, and
    read from there while neither the images (by path, size and time) nor the weights change."""
    weights = (trained.path / WEIGHTS).stat()
    state = [[str(p.resolve()), *_stamp(p)] for p in paths]
    digest = hashlib.sha256(json.dumps([[weights.st_size, weights.st_mtime_ns], state]).encode()).hexdigest()
    name = hashlib.sha256(json.dumps([row[0] for row in state]).encode()).hexdigest()[:16]
    file = run / CACHE / f"{name}.safetensors"
    if file.is_file():
        with contextlib.suppress(SafetensorError, OSError, AlteredError):
            content, metadata = load_sealed_tensors(file)
            if metadata.get("digest") == digest:
                return content["image_ND"]
    prepare, parts = Prepare(trained.recipe.model, trained.text_tokenizer), []
    for start in range(0, len(paths), BATCH):
        chunk = paths[start : start + BATCH]
        batch = prepare.images([read_image(p, trained) for p in chunk], [str(p) for p in chunk])
        with torch.no_grad():
            parts.append(model.embed_images(batch.to(device)).cpu())
    image_ND = torch.cat(parts)
    with contextlib.suppress(OSError):  # a run on a read-only disk still answers
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_sealed_tensors({"image_ND": image_ND}, temporary, {"digest": digest})
        temporary.replace(file)
    return image_ND


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found.st_size, found.st_mtime_ns


# ------------------------------------------------------------------------------------------------------------- experts
@contextlib.contextmanager
def record_load(model: nn.Module) -> Iterator[dict[str, list[float]]]:
    """While it is open, counts which experts serve tokens; on leaving, the dict holds each expert's share by layer."""
    counts: dict[str, Tensor] = {}
    shares: dict[str, list[float]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            parts = name.split(".")  # backbone.blocks.N.branches.MODALITY.layer
            label = f"{parts[2]}/{parts[4]}"

            def count(_: nn.Module, __: Any, out: tuple[Tensor, RoutingStats], label: str = label) -> None:
                load_E = out[1].load_E
                counts[label] = counts[label] + load_E if label in counts else load_E

            handles.append(module.register_forward_hook(count))
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()
    for label, load_E in counts.items():
        shares[label] = (load_E / load_E.sum().clamp_min(1)).tolist()


def print_prediction(result: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console()
    table = Table(title=result["task"], title_justify="left")
    table.add_column("answer")
    for column in ("probability", "similarity"):
        if column in result["answers"][0]:
            table.add_column(column, justify="right")
    for row in result["answers"]:
        values = [f"{row[c]:.3f}" for c in ("probability", "similarity") if c in row]
        table.add_row(row["answer"], *values)
    console.print(table)
    for label, shares in result["experts"].items():
        order = sorted(range(len(shares)), key=lambda e: -shares[e])[:4]
        named = ", ".join(f"{e} ({100 * shares[e]:.0f}%)" for e in order if shares[e] > 0)
        console.print(f"  block {label}: experts {named}", highlight=False, markup=False)
