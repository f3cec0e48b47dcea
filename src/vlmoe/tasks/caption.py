"""Captioning as BEiT-3 does it: the masked model itself writes from left to right.

In training most of a caption's tokens are hidden and predicted, each from the image and what stands before it. To
write, a mask token is put at the end, filled in, and the next one put behind it. No decoder is added: the head is that
of pre-training, and who looks at whom is a mask (`Backbone.forward`, causal).

Shape suffixes: B images · K beams · T text tokens · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.config import FinetuneRecipe
from vlmoe.data.batch import Batch
from vlmoe.data.downstream.collate import Prepare
from vlmoe.data.downstream.example import Example
from vlmoe.data.text_tokenizer import TextTokenizer
from vlmoe.metrics import Score, bleu4, cider_d
from vlmoe.tasks.base import StepOutput, Summed
from vlmoe.tasks.downstream import Downstream


@dataclass
class Written:
    """Captions of one image, best first: texts and the probability of each. finite: see `predict`."""

    texts: list[str]
    probabilities: list[float]
    finite: bool = True


@dataclass
class Beam:
    """One image's search. alive: (score, tokens), best first; done: (score with length penalty, log-probability,
    tokens). finite: False once a logit was nan or infinite; the search ends there."""

    alive: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    done: list[tuple[float, float, list[int]]] = field(default_factory=list)
    finite: bool = True

    def give_up(self) -> None:
        self.alive, self.done, self.finite = [], [(math.nan, math.nan, [])], False


class Caption(Downstream):
    task = "caption"
    main = "CIDEr"
    swaps = "image"

    def __init__(self, recipe: FinetuneRecipe, labels: tuple[str, ...]) -> None:
        super().__init__(recipe, labels)
        self.text_bias = nn.Parameter(torch.zeros(recipe.model.vocabulary))
        self.tokenizer: TextTokenizer | None = None  # needed to write, not to train

    @staticmethod
    def collate(
        prepare: Prepare, recipe: FinetuneRecipe, labels: tuple[str, ...],
        examples: list[Example], rngs: list[np.random.Generator], training: bool,
    ) -> dict[str, Batch]:  # fmt: skip
        keys, images = [e.key for e in examples], [e.images[0] for e in examples]
        if not training:
            return {"image": Batch(keys=keys) if prepare.blind == "image" else prepare.images(images, keys)}
        texts = [e.references[int(r.integers(len(e.references)))] for e, r in zip(examples, rngs, strict=True)]
        return {"pair": prepare.hidden_captions(images, texts, keys, recipe.caption.mask, rngs)}

    def text_logits(self, x_MD: Tensor) -> Tensor:
        return F.linear(x_MD, self.backbone.text.tokens.weight, self.text_bias).float()

    def forward(self, batches: dict[str, Batch]) -> StepOutput:
        batch = batches["pair"]
        assert batch.target_BT is not None
        output = self.run(batch, causal="text")
        hidden_M = batch.hidden_tokens()
        logits_MV = self.text_logits(output.features("text").flatten(0, 1).index_select(0, hidden_M))
        target_M = batch.target_BT.flatten().index_select(0, hidden_M)
        accuracy = (logits_MV.detach().argmax(dim=-1) == target_M).float().mean()
        loss = Summed(F.cross_entropy(logits_MV, target_M, reduction="sum"), len(target_M))
        return self.output(loss, [output], accuracy=accuracy)

    def predictions(self, batches: dict[str, Batch]) -> dict[str, int]:
        return {self.task: len(batches["pair"].hidden_tokens())} | super().predictions(batches)

    # ------------------------------------------------------------------------------------------------------- writing
    @torch.no_grad()
    def predict(self, batches: dict[str, Batch]) -> list[Written]:
        """Beam search. Captions end with the end token or at `caption.max_length` tokens."""
        config, model, tokenizer = self.recipe.caption, self.recipe.model, self._tokenizer()
        batch = batches["image"]
        longest = config.max_length or model.max_text - 2
        beams = [Beam() for _ in batch.keys]
        for length in range(longest + 1):
            rows = [(b, score, tokens) for b, beam in enumerate(beams) for score, tokens in beam.alive]
            if not rows:
                break
            log_RV = self._next(batch, rows)
            for (b, _, _), broken in zip(rows, log_RV.isnan().any(dim=-1).tolist(), strict=True):
                if broken:
                    beams[b].give_up()
            if length < config.min_length:
                log_RV[:, tokenizer.end_id] = -math.inf
            best = log_RV.topk(min(2 * config.beam, log_RV.shape[1]), dim=-1)  # half of them may be ends
            found: list[list[tuple[float, list[int], int]]] = [[] for _ in beams]
            for (b, score, tokens), values, ids in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                found[b] += [(score + v, tokens, i) for v, i in zip(values, ids, strict=True) if v > -math.inf]
            for beam, candidates in zip(beams, found, strict=True):
                if beam.alive:
                    self._advance(beam, candidates, length, longest)
        return [self._written(beam) for beam in beams]

    def _next(self, batch: Batch, rows: list[tuple[int, float, list[int]]]) -> Tensor:
        """(R, V) log-probabilities of the token that follows each row's; what is never written has none. A row with a
        logit of nan or infinity is all nan."""
        tokenizer = self._tokenizer()
        device = self.text_bias.device
        ids_RT = [[tokenizer.start_id, *tokens, tokenizer.mask_id] for _, _, tokens in rows]
        image = None
        if batch.image_BCHW is not None:
            image = batch.image_BCHW[torch.tensor([b for b, _, _ in rows], device=batch.image_BCHW.device)]
        part = Batch(keys=[""] * len(rows), image_BCHW=image, text_BT=torch.tensor(ids_RT, device=device))
        logits_RV = self.text_logits(self.run(part, causal="text").features("text")[:, -1])
        broken_R1 = ~logits_RV.isfinite().all(dim=-1, keepdim=True)
        never = [tokenizer.start_id, tokenizer.pad_id, tokenizer.mask_id, *range(tokenizer.size, logits_RV.shape[1])]
        logits_RV[:, never + ([] if tokenizer.unk_id is None else [tokenizer.unk_id])] = -math.inf
        return logits_RV.log_softmax(dim=-1).masked_fill(broken_R1, math.nan)

    def _advance(self, beam: Beam, found: list[tuple[float, list[int], int]], length: int, longest: int) -> None:
        """Keep the best beams that go on, put aside those that end; stop when none alive can still win."""
        config, end = self.recipe.caption, self._tokenizer().end_id
        found.sort(key=lambda c: -c[0])
        beam.alive = []
        for score, tokens, token in found[: 2 * config.beam]:
            if token == end or length == longest:
                penalty = ((5 + length) / 6) ** config.length_penalty
                beam.done.append((score / penalty, score, tokens))
            elif len(beam.alive) < config.beam:
                beam.alive.append((score, [*tokens, token]))
        beam.done = sorted(beam.done, key=lambda d: -d[0])[: config.beam]
        if beam.alive and len(beam.done) == config.beam:
            hoped = beam.alive[0][0] / ((5 + longest) / 6) ** config.length_penalty  # scores only fall
            if hoped <= beam.done[-1][0]:
                beam.alive = []

    def _written(self, beam: Beam) -> Written:
        tokenizer = self._tokenizer()
        done = beam.done or [(s, s, tokens) for s, tokens in beam.alive]
        texts = [tokenizer.decode(tokens) for _, _, tokens in done]
        return Written(texts, [math.exp(s) for _, s, _ in done], beam.finite)

    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise RuntimeError("a captioner writes with a tokenizer: set `tokenizer` first")
        return self.tokenizer

    # --------------------------------------------------------------------------------------------------------- scores
    def score(self, answers: Sequence[Written], examples: Sequence[Example]) -> dict[str, Score]:
        """CIDEr-D (document frequencies from these examples' references) and BLEU-4."""
        known = [(a.texts[0], list(e.references)) for a, e in zip(answers, examples, strict=True) if e.references]
        texts, references = [text for text, _ in known], [refs for _, refs in known]
        return {"CIDEr": cider_d(texts, references), "BLEU-4": bleu4(texts, references)} if known else {}

    def guess(self, examples: Sequence[Example]) -> dict[str, Score]:
        """The reference that fits all examples best, of the first hundred."""
        references = [list(e.references) for e in examples if e.references]
        candidates = [refs[0] for refs in references[:100]]
        scored = [(cider_d([c] * len(references), references, resamples=0).value, c) for c in candidates]
        if not scored:
            return {}
        best = max(scored)[1]
        texts = [best] * len(references)
        return {"CIDEr": cider_d(texts, references), "BLEU-4": bleu4(texts, references)}

    def show(self, answer: Written) -> list[dict[str, Any]]:
        return [{"answer": text, "probability": p} for text, p in zip(answer.texts, answer.probabilities, strict=True)]
