"""Image-text retrieval by a dual encoder: each side alone through the backbone, a contrastive loss between the two.

Shape suffixes: B batch · C captions · D width · G samples of all processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare
from vlmoe.data.downstream.example import Example
from vlmoe.metrics import Score, ranks, recall
from vlmoe.tasks.base import StepOutput, Summed
from vlmoe.tasks.downstream import Downstream

MAX_SCALE = math.log(100)  # of the similarities, as in CLIP


@dataclass
class Embedded:
    """An image and its captions as unit vectors: (D,), (C, D)."""

    image_D: Tensor
    text_CD: Tensor

    @property
    def finite(self) -> bool:
        return bool(self.image_D.isfinite().all() and self.text_CD.isfinite().all())


class Retrieval(Downstream):
    task = "retrieval"
    main = "mean_recall"

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__(recipe, labels)
        width = recipe.model.width
        self.image_head = nn.Linear(width, width, bias=False)
        self.text_head = nn.Linear(width, width, bias=False)
        for head in (self.image_head, self.text_head):
            nn.init.trunc_normal_(head.weight, std=1 / math.sqrt(width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # one over the temperature, learned (CLIP)

    @staticmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        """In training one caption of each image, else all of them one after the other."""
        keys = [e.key for e in examples]
        captions = [
            [e.references[int(rng.integers(len(e.references)))]] if training else list(e.references)
            for e, rng in zip(examples, rngs, strict=True)
        ]
        flat = [(key, text) for key, texts in zip(keys, captions, strict=True) for text in texts]
        return {
            "image": prepare.images([e.images[0] for e in examples], keys),
            "text": prepare.texts([text for _, text in flat], [key for key, _ in flat]),
        }

    def embed_images(self, batch: Batch) -> Tensor:
        """(B, D) unit vectors."""
        return F.normalize(self.image_head(self.run(batch).features("vision")[:, 0]).float(), dim=-1)

    def embed_texts(self, batch: Batch) -> Tensor:
        """(B, D) unit vectors."""
        return F.normalize(self.text_head(self.run(batch).features("text")[:, 0]).float(), dim=-1)

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        outputs = [self.run(batches["image"]), self.run(batches["text"])]
        image_BD = F.normalize(self.image_head(outputs[0].features("vision")[:, 0]).float(), dim=-1)
        text_BD = F.normalize(self.text_head(outputs[1].features("text")[:, 0]).float(), dim=-1)
        loss, accuracy = contrastive_loss(image_BD, text_BD, self.log_scale.clamp(max=MAX_SCALE).exp())
        # images and texts of the batch are each other's negatives: no sum over predictions, so one of the whole batch
        return self.output(Summed(loss, 1), outputs, accuracy=accuracy, scale=self.log_scale.exp())

    @torch.no_grad()
    def predict(self, batches: dict[str, Batch]) -> list[Embedded]:
        image_BD, text_ND = self.embed_images(batches["image"]).cpu(), self.embed_texts(batches["text"]).cpu()
        rows: dict[str, list[int]] = {key: [] for key in batches["image"].keys}
        for i, key in enumerate(batches["text"].keys):
            rows[key].append(i)
        return [Embedded(image_BD[b], text_ND[rows[key]]) for b, key in enumerate(batches["image"].keys)]

    def score(self, answers: Sequence[Embedded], examples: Sequence[Example]) -> dict[str, Score]:
        """Recall at 1, 5 and 10 of texts for an image (TR) and of images for a text (IR), and the mean of the six.

        Equal texts are one text, found and asked for once, and right for every image that has it. (COCO's usual script
        tells captions apart by their number; it differs where two are the same, letter by letter.)
        """
        if not answers:
            return {}
        image_ND = torch.stack([a.image_D for a in answers])
        number, texts = _texts(examples)
        rows = torch.cat([a.text_CD for a in answers])
        first: dict[int, int] = {}
        for row, m in enumerate(m for of_image in texts for m in of_image):
            first.setdefault(m, row)
        text_MD = rows[[first[m] for m in range(len(number))]]
        owners: list[list[int]] = [[] for _ in number]
        for n, of_image in enumerate(texts):
            for m in set(of_image):
                owners[m].append(n)
        found = {"TR": recall(ranks(image_ND, text_MD, texts)), "IR": recall(ranks(text_MD, image_ND, owners))}
        scores = {f"{way}@{name.rpartition('@')[2]}": s for way, scores in found.items() for name, s in scores.items()}
        mean = sum(s.value for s in scores.values()) / len(scores)
        return {"mean_recall": Score(mean, None, len(answers)), **scores}

    def counts(self, examples: Sequence[Example]) -> dict[str, int]:
        number, texts = _texts(examples)
        images = Counter(m for of_image in texts for m in set(of_image))
        return {
            "captions": sum(map(len, texts)),
            "different texts": len(number),
            "texts of more than one image": sum(n > 1 for n in images.values()),
        }

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        """A random order: the chance that a right one is among the first k."""
        number, texts = _texts(examples)
        owners = Counter(m for of_image in texts for m in set(of_image))
        scores = {}
        for way, total, right in (
            ("TR", len(number), [len(set(of_image)) for of_image in texts]),
            ("IR", len(texts), [owners[m] for m in range(len(number))]),
        ):
            for k in (1, 5, 10):
                hit = [1 - _miss(total, r, k) for r in right]
                scores[f"{way}@{k}"] = Score(sum(hit) / max(1, len(hit)), None, len(hit))
        mean = sum(s.value for s in scores.values()) / 6
        return {"mean_recall": Score(mean, None, len(texts)), **scores}


def _texts(examples: Sequence[Example]) -> tuple[dict[str, int], list[list[int]]]:
    """Each different text's number, and of each image the numbers of its captions. Texts are equal that are so letter
    by letter once runs of white space are one space."""
    number: dict[str, int] = {}
    joined = [[" ".join(text.split()) for text in e.references] for e in examples]
    return number, [[number.setdefault(text, len(number)) for text in texts] for texts in joined]


def _miss(total: int, right: int, k: int) -> float:
    """Chance that none of `right` among `total` is among the first k of a random order."""
    return math.prod((total - right - i) / (total - i) if total - i > 0 else 0.0 for i in range(min(k, total)))


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of both directions' cross-entropy over the pairs of all processes (CLIP), and the accuracy over both.

    Each process holds the same number of pairs and judges its own against everybody's. Gradients flow back to the
    processes the others come from; averaged over processes they are those of the whole batch in one process.
    """
    image_GD, text_GD = gather(image_BD), gather(text_BD)
    first = dist.get_rank() * len(image_BD) if dist.is_initialized() else 0
    target_B = torch.arange(first, first + len(image_BD), device=image_BD.device)
    with torch.autocast(image_BD.device.type, enabled=False):  # at a scale of 100 bfloat16 rounds scores by 0.25
        to_text_BG, to_image_BG = scale * image_BD @ text_GD.T, scale * text_BD @ image_GD.T
    loss = (F.cross_entropy(to_text_BG, target_B) + F.cross_entropy(to_image_BG, target_B)) / 2
    right = [(logits.detach().argmax(dim=-1) == target_B).float().mean() for logits in (to_text_BG, to_image_BG)]
    return loss, (right[0] + right[1]) / 2


def gather(x_BD: Tensor) -> Tensor:
    """(G, D): the rows of all processes, in order of rank, with gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_BD
    return torch.cat(all_gather(x_BD.contiguous()))
