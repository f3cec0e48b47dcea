"""The keys of a fine-tuning recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmoe.config.schema import AugmentConfig, ModelConfig, RunConfig, TrainConfig, WorldConfig

TASKS = ("vqa", "nlvr2", "retrieval", "classify", "nli", "caption")


@dataclass
class FilesConfig:
    """One split of a task's own files; see docs/finetune.md for what each task reads.

    file: questions JSON (vqa), .jsonl (nlvr2), dataset_*.json (retrieval, caption), folder of classes (classify),
    .jsonl, .tsv or parquet (nli); one's own .jsonl, .csv or .tsv (vqa, retrieval, caption).
    """

    name: str = ""  # of a split that is evaluated; empty: val
    file: str = ""  # the examples
    annotations: str = ""  # vqa: annotations JSON
    images: str = ""  # folder of the images (vqa, nlvr2, retrieval, caption); of one's own empty: the file's folder
    part: str = ""  # retrieval, caption, one's own: the file's own splits to read, "train,restval"
    group: str = ""  # one's own: columns whose values are scored apart, "country,year"; empty: "group" if it is there


@dataclass
class TaskDataConfig:
    """The task's examples."""

    type: str = "world"  # world, files
    world: WorldConfig = field(default_factory=WorldConfig)  # the pre-trained run's, changed where a recipe says so
    questions: list[str] = field(default_factory=list)  # world's vqa: kinds of questions asked; empty: all
    train: FilesConfig = field(default_factory=FilesConfig)  # with type files
    eval: list[FilesConfig] = field(default_factory=list)  # splits to evaluate; the first one decides when to stop
    answers: int = 3129  # vqa on files: the most frequent answers that can be given
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    blind: str = "none"  # none; image or text: train and evaluate without it, as a baseline
    limit: int | None = None  # training examples used; null: all
    batch: int = 64  # examples in a micro-batch
    workers: int = 1  # processes that prepare batches; 0: the one that trains
    max_bad_share: float = 0.01  # the run fails when more than this share of examples had to be skipped
    max_pixels: int = 64_000_000  # larger images are refused before they are decoded


@dataclass
class SparseConfig:
    """What happens to routers and experts. Capacity at evaluation and expert dropout are keys of the model:
    model.vision.router.capacity_factor_eval, model.vision.expert_dropout, and the same for text."""

    train: str = "all"  # all, freeze_routers, freeze_experts, experts_only (the experts and the head)
    losses: bool = True  # keep the routing losses of pre-training


@dataclass
class TaskTrainConfig(TrainConfig):
    """The keys of pre-training's `train`, and those of fine-tuning."""

    epochs: float | None = None  # over the training examples; given, it replaces `steps`
    warmup_epochs: float | None = None  # given, it replaces `warmup`
    layer_decay: float = 1.0  # learning rate of each block over that of the block above it
    head_lr: float = 1.0  # learning rate of the head over that of the top block
    scratch: bool = False  # start from random weights: the baseline that pre-training has to beat
    fresh: list[str] = field(default_factory=list)  # parts of the backbone, as text.tokens, drawn anew
    validate_every: int = 0  # steps; 0: ten times in a run
    patience: int = 0  # stop after this many validations without a better one; 0: never


@dataclass
class TaskEvalConfig:
    """The scores at the end of a run, and what chooses its best weights."""

    samples: int = 1000  # examples of each split of the world, at most; files are evaluated whole
    validate: int = 500  # examples of the first split, at most, that choose the best checkpoint
    batch: int = 64  # examples at a time


@dataclass
class CaptionConfig:
    """The task caption alone: how captions are learned and written."""

    mask: float = 0.7  # share of a caption's tokens that is hidden in training
    beam: int = 3  # captions that are carried on side by side
    max_length: int = 0  # tokens; 0: model.max_text - 2
    min_length: int = 1  # tokens
    length_penalty: float = 0.6  # scores are divided by ((5 + length) / 6) to this power


@dataclass
class FinetuneRecipe:
    """A fine-tuning run. `model` and `data.world` are the pre-trained run's; only what a recipe names is changed."""

    name: str = ""  # empty: made of the pre-trained run's and the task's
    about: str = ""  # what it is
    task: str = ""  # vqa, nlvr2, retrieval, classify, nli, caption
    init: str = ""  # the pre-trained run
    seed: int = 0  # of the head's weights and the order of the data
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    train: TaskTrainConfig = field(default_factory=TaskTrainConfig)
    eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)
