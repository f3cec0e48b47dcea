"""A model whose experts do what is known, to test the methods that look for it.

A real model (attention and feed-forward layers with random weights, a mixture per modality in the last block) whose
routers and experts are set by hand. A text is a row of cues, each of a class and a tint; at a cue its class must be
named. An image's hidden patches must be named by their row. What names them:

- Owners: the expert that a class or row is sent to, and it alone, adds the answer. Planted as cause.
- One owner serves two classes; one adds the answer only to cues of one tint, which is cause without preference: all
  tints go to it alike.
- Decoys: experts that take a class or row for themselves and add nothing (their second matrix is 0), for the answer is
  in the cue already. They look specialised and are no cause.
- Colours of patches and the place of a cue have nothing to do with anything.

Shape suffixes: B batch · P patches · T text tokens · D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from vlmoe.config import from_mapping
from vlmoe.data.batch import IGNORE, Batch
from vlmoe.data.text_tokenizer import HFTokenizer
from vlmoe.data.visual_tokenizer import StoredCodes
from vlmoe.interpret.causal import Pair, agreement, matrix
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.recorder import record
from vlmoe.moe import MoELayer
from vlmoe.tasks.export import Pretrained
from vlmoe.tasks.pretrain import MaskedDataModelling

WIDTH, EXPERTS, SIDE, PATCH, LENGTH = 64, 8, 4, 12, 14
CLASSES, TINTS, COLOURS = 7, 3, 3
CLASS_OWNERS = {0: 0, 1: 1, 2: 2, 3: 2}  # class -> expert, before experts are shuffled
CLASS_DECOYS = {4: 3, 5: 4}
TINTED_CLASS, TINT, TINTED_OWNER = 6, 0, 5
ROW_OWNERS, ROW_DECOYS = {0: 0, 1: 1, 2: 2}, {3: 3}
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
CUE, MARK, TINTED, ANSWER = 12.0, 8.0, 6.0, 6.0  # sizes of what is known of a token, beside noise of about 1
QUIET = 0.3  # of the random layers' outputs

Known = tuple[str, int, str, str]  # site, expert, factor, value


@dataclass
class Planted:
    """causes: what must be found and nothing else; unseen: those of them that routing does not show; decoys: what looks
    like a cause and is none. k: experts of a token."""

    subject: OwnSubject
    batches: list[Batch]
    causes: set[Known] = field(default_factory=set)
    unseen: set[Known] = field(default_factory=set)
    decoys: set[Known] = field(default_factory=set)


def build(seed: int = 0, samples: int = 96, k: int = 1) -> Planted:
    """A planted model and its data; the seed decides who owns what, the random layers and the samples."""
    generator = torch.Generator().manual_seed(seed)
    trained = _model(seed, k)
    model = trained.model
    known = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0].T  # orthonormal rows
    directions = {
        "class": known[:CLASSES],
        "tint": known[CLASSES : CLASSES + TINTS],
        "answer": known[CLASSES + TINTS : 2 * CLASSES + TINTS],
        "row": known[2 * CLASSES + TINTS : 2 * CLASSES + TINTS + SIDE],
        "code": known[2 * CLASSES + TINTS + SIDE : 2 * CLASSES + TINTS + 2 * SIDE],
    }
    order = {side: torch.randperm(EXPERTS, generator=generator).tolist() for side in ("text", "vision")}
    with torch.no_grad():
        _plant_text(model, directions, order["text"])
        _plant_vision(model, directions, order["vision"])
    planted = Planted(OwnSubject(trained), _batches(trained, samples, np.random.default_rng(seed)))
    for numbers, name, site, found in (
        (CLASS_OWNERS, "class", "1/text", planted.causes), (CLASS_DECOYS, "class", "1/text", planted.decoys),
        (ROW_OWNERS, "row", "1/vision", planted.causes), (ROW_DECOYS, "row", "1/vision", planted.decoys),
    ):  # fmt: skip
        found |= {(site, order[site[2:]][e], name, f"{name} {value}") for value, e in numbers.items()}
    tinted = order["text"][TINTED_OWNER]
    planted.unseen = {("1/text", tinted, "tint", f"tint {TINT}")}
    planted.causes |= planted.unseen | {("1/text", tinted, "class", f"class {TINTED_CLASS}")}
    return planted


def validate(seeds: Sequence[int] = (0, 1, 2), samples: int = 96, mode: str = "reroute", k: int = 1) -> dict[str, Any]:
    """Look for the planted causes of several models by `causal.matrix`, with all of its corrections.

    Returns counts over all models: "planted", "recovered", "missed" and "extra" (lists),
    "decoys" and "decoys_found" (among what looks specialised and is not), "unseen" and "unseen_found" (among causes
    without lift), "comparisons" made.
    """
    report: dict[str, Any] = {"models": len(seeds), "samples": samples, "mode": mode, "k": k, "comparisons": 0}
    report |= {"planted": 0, "recovered": 0, "missed": [], "extra": []}
    report |= dict.fromkeys(("decoys", "decoys_found", "unseen", "unseen_found"), 0)
    for seed in seeds:
        planted = build(seed, samples, k)
        found = matrix(planted.subject, planted.batches, mode=mode)
        causes = {(site, e, g.factor, g.value) for site in found.sites for e, g in found.causes(site)}
        with tempfile.TemporaryDirectory() as folder:
            recording = record(planted.subject, planted.batches, Path(folder) / "recording")
            agreed = {site: agreement(recording, found, site) for site in found.sites}
        looks = {known for site, a in agreed.items() for known in _known(site, a.looks_specialised_but_is_not)}
        unseen = {known for site, a in agreed.items() for known in _known(site, a.cause_without_lift)}
        report["comparisons"] += found.comparisons
        report["planted"] += len(planted.causes)
        report["recovered"] += len(planted.causes & causes)
        report["missed"] += sorted(planted.causes - causes)
        report["extra"] += sorted(causes - planted.causes)
        report["decoys"] += len(planted.decoys)
        report["decoys_found"] += len(planted.decoys & looks)
        report["unseen"] += len(planted.unseen)
        report["unseen_found"] += len(planted.unseen & unseen)
    return report


def _known(site: str, pairs: list[Pair]) -> set[Known]:
    return {(site, p.expert, p.factor, p.value) for p in pairs}


# ------------------------------------------------------------------------------------------------------------- weights
def _model(seed: int, k: int) -> Pretrained:
    words = [*SPECIAL, *(f"class{c}-tint{t}" for c in range(CLASSES) for t in range(TINTS))]
    words += [f"answer{c}" for c in range(CLASSES)]
    side = {"sparse": "last", "experts": EXPERTS, "router": {"k": k, "renormalize": k > 1, "noise": 0}}
    plan = from_mapping(
        {
            "name": "planted",
            "model": {
                "width": WIDTH, "depth": 2, "heads": 4, "mlp_ratio": 1, "activation": "relu", "vl_ffn": 0,
                "image_size": SIDE * PATCH, "patch": PATCH, "max_text": LENGTH + 2, "vocabulary": len(words),
                "codes": SIDE, "vision": side, "text": side,
            },
            "data": {"visual_tokenizer": {"type": "codes"}},
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    model = MaskedDataModelling(plan.model, StoredCodes(SIDE)).eval()
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = HFTokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")))
    with torch.no_grad():
        for name, parameter in model.backbone.blocks.named_parameters():
            if name.endswith(".w2") or ".out." in name:
                parameter.mul_(QUIET)
    return Pretrained(model, tokenizer, StoredCodes(SIDE), plan, Path("planted"))


def _cue(group: int, tint: int) -> int:
    return len(SPECIAL) + group * TINTS + tint


def _plant_text(model: MaskedDataModelling, known: dict[str, Tensor], order: list[int]) -> None:
    embedding = model.backbone.text.tokens.weight
    first_answer = _cue(CLASSES, 0)
    embedding[: len(SPECIAL)].normal_(std=0.1)
    for group in range(CLASSES):
        for tint in range(TINTS):
            told = group in CLASS_DECOYS or (group == TINTED_CLASS and tint != TINT)
            embedding[_cue(group, tint)] = (
                CUE * known["class"][group] + MARK * known["tint"][tint] + TINTED * told * known["answer"][group]
            )
        embedding[first_answer + group] = known["answer"][group]
    model.text_bias[:first_answer] = -1000.0  # a cue is no answer, large as its own logit is
    layer = model.backbone.routed_layers()["1/text"]
    _silent(layer)
    for group, expert in {**CLASS_OWNERS, **CLASS_DECOYS, TINTED_CLASS: TINTED_OWNER}.items():
        layer.router.weight[order[expert]] += 2 * known["class"][group]
    for unit, (group, expert) in enumerate(CLASS_OWNERS.items()):
        _answer(layer, order[expert], unit, known["class"][group], 3.0, known["answer"][group])
    both = known["class"][TINTED_CLASS] + known["tint"][TINT]
    _answer(layer, order[TINTED_OWNER], 0, both, 8.0, known["answer"][TINTED_CLASS])


def _plant_vision(model: MaskedDataModelling, known: dict[str, Tensor], order: list[int]) -> None:
    image = model.backbone.image
    image.mask_token.zero_()
    image.project.weight.mul_(0.3)
    for patch in range(SIDE * SIDE):
        row = patch // SIDE
        image.position[0, 1 + patch] = CUE * known["row"][row] + TINTED * (row in ROW_DECOYS) * known["code"][row]
    model.image_head.weight.copy_(known["code"])
    layer = model.backbone.routed_layers()["1/vision"]
    _silent(layer)
    for row, expert in {**ROW_OWNERS, **ROW_DECOYS}.items():
        layer.router.weight[order[expert]] += 2 * known["row"][row]
    for unit, (row, expert) in enumerate(ROW_OWNERS.items()):
        _answer(layer, order[expert], unit, known["row"][row], 3.0, known["code"][row])


def _silent(layer: MoELayer) -> None:
    """Experts that add nothing, and a router that prefers none."""
    for weight in (layer.router.weight, layer.experts.w1, layer.experts.w2, layer.experts.b1, layer.experts.b2):
        if weight is not None:
            weight.zero_()


def _answer(layer: MoELayer, expert: int, unit: int, cue_D: Tensor, least: float, answer_D: Tensor) -> None:
    """One hidden unit that fires above `least` of the cue in the normed token, and adds the answer."""
    assert layer.experts.b1 is not None
    layer.experts.w1[expert, :, unit] = cue_D
    layer.experts.b1[expert, unit] = -least
    layer.experts.w2[expert, unit] = ANSWER * answer_D


# ---------------------------------------------------------------------------------------------------------------- data
def _batches(trained: Pretrained, samples: int, rng: np.random.Generator, size: int = 32) -> list[Batch]:
    """Pairs of a picture of coloured patches and a row of cues; of both about two thirds are to be named. Every tint
    is as frequent in each class."""
    cues = np.array([(c, t) for c in range(CLASSES) for t in range(TINTS)])
    drawn = cues[np.concatenate([rng.permutation(len(cues)) for _ in range(-(-samples * LENGTH // len(cues)))])]
    cue_BT2 = drawn[: samples * LENGTH].reshape(samples, LENGTH, 2)
    return [_batch(trained, cue_BT2[start : start + size], start, rng) for start in range(0, samples, size)]


def _batch(trained: Pretrained, cue_BT2: np.ndarray, start: int, rng: np.random.Generator) -> Batch:
    B, (tokenizer, P, T) = len(cue_BT2), (trained.text_tokenizer, SIDE * SIDE, LENGTH + 2)
    colour_BP = rng.integers(COLOURS, size=(B, P))
    shades = np.array([[220, 60, 60], [60, 200, 60], [60, 60, 220]], dtype=np.uint8)
    image = shades[colour_BP].reshape(B, SIDE, SIDE, 3).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    text_BT, target_BT = np.full((B, T), tokenizer.pad_id), np.full((B, T), IGNORE)
    length_B = rng.integers(LENGTH - 4, LENGTH + 1, size=B)
    token_factors = []
    for b, length in enumerate(length_B):
        group_T, tint_T = cue_BT2[b, :length].T
        text_BT[b, : length + 2] = [tokenizer.start_id, *_cue(0, 0) + group_T * TINTS + tint_T, tokenizer.end_id]
        asked_T = rng.random(length) < 0.67
        target_BT[b, 1 : length + 1] = np.where(asked_T, _cue(CLASSES, 0) + group_T, IGNORE)
        rest = [""] * (T - length - 1)
        token_factors.append(
            {
                "class": ["", *(f"class {c}" for c in group_T), *rest],
                "tint": ["", *(f"tint {t}" for t in tint_T), *rest],
                "place": ["", *("early" if i < LENGTH // 2 else "late" for i in range(length)), *rest],
            }
        )
    rows = [f"row {p // SIDE}" for p in range(P)]
    return Batch(
        keys=[f"planted/{start + b}" for b in range(B)],
        image_BCHW=torch.from_numpy(image).permute(0, 3, 1, 2).contiguous(),
        patch_mask_BP=torch.from_numpy(rng.random((B, P)) < 0.67),
        codes_BP=torch.arange(P).div(SIDE, rounding_mode="floor").expand(B, -1).contiguous(),
        text_BT=torch.from_numpy(text_BT),
        valid_BT=torch.arange(T) < torch.from_numpy(length_B + 2)[:, None],
        target_BT=torch.from_numpy(target_BT),
        patch_factors=[{"row": rows, "colour": [f"colour {c}" for c in colour_BP[b]]} for b in range(B)],
        token_factors=token_factors,
    )
