"""The recipe's keys: a tree of plain dataclasses, each with its default.

What `vlmoe recipe keys` and docs/recipe-keys.md say of a key is the comment beside its field, with the lines below; of
a group, its class's docstring.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

LEAST_BYTE_VOCABULARY = 512  # rows of model.vocabulary: half of them for bytes and special tokens


class UserError(ValueError):
    """Something a user can put right; the command line prints it as one line. Every error meant for users is one."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the key and what was expected."""


# --------------------------------------------------------------------------------------------------------------- model
@dataclass
class RouterConfig:
    """How tokens choose experts, and the losses that keep the choice healthy (see `vlmoe.moe.MoELayer`)."""

    type: str = "softmax"  # softmax, sigmoid, cosine, expert_choice, hash, soft (see `vlmoe.moe.routers`)
    k: int = 1  # experts that a token takes
    slots: int = 1  # soft: of each expert, for each sequence; experts * slots = k * tokens costs what top-k does
    renormalize: bool = False  # divide the k gates by their sum; not with one expert a token, where it would be 1
    noise: float = 1.0  # std of the training noise on the logits, in units of 1/E (V-MoE: 1.0; 0 turns it off)
    capacity_factor: float | None = None  # places in an expert over an even share, in training; null: dropless
    capacity_factor_eval: float | None = None  # the same in evaluation
    priority: str = "batch"  # who keeps a place: batch, largest gates; arrival, first come, first served; first_batch
    # and first_arrival place all first choices before second ones (V-MoE's batch priority and vanilla routing)
    balance: float = 0.01  # weight of the Switch/GShard balance loss, which is 1 when even for any k. In
    # transformers it is k: a router_aux_loss_coef there is a weight k times as large here
    importance: float = 0.0  # weight of V-MoE's importance loss
    load: float = 0.0  # weight of V-MoE's load loss
    z: float = 0.001  # weight of the router z-loss
    local_entropy: float = 0.0  # weight of LIMoE's local loss: each token's choice should be decided
    global_entropy: float = 0.0  # weight of LIMoE's global loss: a modality as a whole should use many experts
    global_experts: float | None = None  # how many experts that loss asks for at least; null: all
    bias_rate: float = 0.0  # step of a selection bias against the load, instead of a loss (DeepSeek-V3: 0.001)
    balance_over: str = "pass"  # the balance loss spans a pass, micro (batch), step (accumulated), global (all devices)
    backend: str = "auto"  # how experts are computed: auto, loop, padded, grouped


@dataclass
class ModalityConfig:
    """The feed-forward side of one modality. A recipe that says nothing of experts gets VL-MoE's layout: every other
    block sparse, a token takes one of eight experts as large as the dense layer. `sparse: none` is a dense model."""

    sparse: str = "odd"  # which blocks: none, all, odd (every other one, from the second), even, last, or "1,3,5"
    experts: int = 8  # in each sparse layer
    expert_size: float = 1.0  # hidden units of an expert, before it is split, over the dense layer's
    granularity: int = 1  # m: experts split into m times as many of 1/m the hidden size, of which a token takes m * k
    shared_experts: int = 0  # additional experts that serve every token, of the split size (DeepSeekMoE)
    expert_dropout: float = 0.0  # of the experts' hidden units, in training (ST-MoE)
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass
class ModelConfig:
    """The Multiway backbone. Sizes are the model's own; tokenizers must fit `vocabulary` and `codes`."""

    width: int = 192  # of a token; a multiple of heads
    depth: int = 6  # blocks
    heads: int = 6  # of attention
    mlp_ratio: float = 4.0  # hidden units of a dense feed-forward layer over width
    activation: str = "gelu"  # gelu, relu, swiglu
    image_size: int = 48  # pixels, square
    patch: int = 8  # pixels, square; a divisor of image_size
    patch_stem: str = "linear"  # what a patch passes: linear (BEiT-3), or conv, convolutions within it before that
    stem_channels: int = 32  # conv: channels of the first convolution; the two after it have twice as many
    max_text: int = 48  # tokens, with start and end
    vocabulary: int = 2048  # rows of the text embedding
    codes: int = 256  # visual vocabulary: codes that a hidden patch can have
    attention: str = "shared"  # shared (VLMo, VL-MoE) or split by modality (BEiT-3)
    vl_ffn: int = 2  # the top blocks in which a pair's tokens share one dense VL-FFN
    sub_ln: bool = False  # extra LayerNorm inside attention and feed-forward (Magneto, BEiT-3)
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0
    common_experts: int = 0  # in blocks sparse for both modalities: additional experts that either may choose
    recompute: bool = False  # activation checkpointing, block by block
    vision: ModalityConfig = field(default_factory=ModalityConfig)
    text: ModalityConfig = field(default_factory=ModalityConfig)


# ---------------------------------------------------------------------------------------------------------------- data
@dataclass
class WorldConfig:
    """The embedded world's dial: from a world a tiny model learns in minutes to one that keeps a large model busy."""

    image_size: int = 48  # pixels; set equal to model.image_size
    concepts: int = 40  # how many things can stand in a scene: ten handwritten digits first, then characters
    icons: int = 0  # how many further things, drawn by icon fonts
    facts: int = 0  # texts also state facts about the first so many of Unicode's named characters
    max_objects: int = 2  # 1 to 4 objects in a scene
    grid: int = 3  # 3: nine places; 2: the four corners, with objects half as large again; 1: the whole picture
    colours: int = 8  # how many colours things can have
    languages: list[str] = field(default_factory=lambda: ["en"])  # of en, de, fr, es
    captions: str = "sentences"  # for worlds of one object also names, its name alone, or codes, name and code point
    captions_in_text: float = 0.5  # share of text-only samples that describe a scene nobody shows
    said_twice: float = 0.0  # share of those that describe it twice, in words drawn anew
    held_out_scenes: float = 0.0  # share of all scenes that training never shows, and `val` alone; 0: both show any


@dataclass
class SourceConfig:
    """One source of samples."""

    type: str = "world"  # world, shards, folder, parquet, arrow (what `datasets` saves with save_to_disk)
    kind: str = "pair"  # what it yields: image, text, pair
    path: str = ""  # shards: brace or glob pattern of .tar files, or of their URLs; folder: directory;
    # parquet: file, brace or glob pattern, folder, or their URLs; arrow: file, glob, folder
    weight: float = 1.0  # its share among the sources of its kind
    held_out: float = 0.01  # files: share of the samples, by hash, that training never sees; 1: all, for validation
    image_column: str = "image"  # parquet, arrow: where images are
    text_column: str = "text"  # parquet, arrow: where texts are; also the key in .json members, .json files and tables
    images: str = ""  # parquet, arrow: folder of images that rows name by their path; empty: the file's own
    turns: str = "answer"  # where the text is a conversation: answer, the first one; all, one after the other
    read: str = "random"  # shards, parquet: random (access), stream (file by file, in epochs), resample (files drawn)
    shard_weights: dict[str, float] = field(default_factory=dict)  # resample: file pattern -> how often, 1 for others


@dataclass
class StreamConfig:
    """How files are read that are not read at random (`read` of a source), and how they are brought from URLs."""

    readers: int = 8  # streams that micro-batches take in turn; data.workers should divide it
    buffer: int = 20_000  # samples of a stream that are shuffled together
    cache: str = ""  # folder for files brought from URLs; empty: vlmoe/files in the user's cache folder
    cache_gb: float = 50.0  # kept there, in 10^9 bytes
    attempts: int = 5  # to open or bring one file


@dataclass
class BatchConfig:
    """Samples of each kind in one micro-batch; 0 leaves the kind out."""

    image: int = 32  # images alone
    text: int = 32  # texts alone
    pair: int = 64  # images with their text


@dataclass
class MaskingConfig:
    """Masked shares as published for BEiT-3."""

    text: float = 0.15  # of the tokens of text-only samples
    pair_text: float = 0.5  # of the tokens of a pair's text
    words: list[str] = field(default_factory=list)  # classes of the words that may be hidden, as [code]; []: any
    patches: float = 0.4  # of the patches of image-only samples, in blocks
    pair_patches: float = 0.4  # of the patches of a pair's image, likewise; 0: pairs teach words alone
    min_block: int = 2  # smallest block, in patches


@dataclass
class AugmentConfig:
    """How images are changed in training, anew each time one is shown, and never where a run is scored. Not for images
    of the embedded world, whose captions state places and colours, nor beside stored visual codes."""

    crop: float | None = None  # least share of an image's area that a random crop takes (torchvision: 0.08, BEiT-3:
    # 0.5, CLIP: 0.9); null: the centre square
    ratio: float = 4 / 3  # a crop is at most so many times as wide as high, or as high as wide; it is made square
    brightness: float = 0.0  # 0.4: up to 40% darker or brighter
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise; 1: down to grey
    hue: float = 0.0  # most turn along the circle of colours, up to 0.5
    flip: float = 0.0  # share of images shown mirrored; captions that say left or right are then untrue

    @property
    def on(self) -> bool:
        """Whether it changes anything."""
        return self.crop is not None or any((self.brightness, self.contrast, self.saturation, self.hue, self.flip))


@dataclass
class TextTokenizerConfig:
    """How texts become tokens."""

    type: str = "corpus"  # corpus (trained on the run's texts), hf (anybody's, as BERT's or SigLIP's), sentencepiece
    # (.model or .spm, as BEiT-3's)
    path: str = ""  # hf, sentencepiece: a file, a folder, or a name on the hub, NAME@REVISION for a certain version
    samples: int = 20000  # texts that corpus training reads
    byte_fallback: bool = False  # corpus: byte pairs, in which what has no token is spelled by its bytes, so that
    # nothing is unknown; 256 rows of model.vocabulary are theirs. false: word pieces


@dataclass
class VisualTokenizerConfig:
    """How patches become the codes that hidden ones are told by."""

    type: str = "vq"  # vq (trained on the run's images), codes (precomputed codes stored beside each image)
    path: str = ""  # a trained tokenizer's folder to reuse; empty: train one for the run
    dim: int = 16  # of a codebook vector
    width: int = 64  # of its network
    steps: int = 600  # of its training
    batch: int = 64  # images in one of these steps
    lr: float = 2e-3  # their learning rate


@dataclass
class DataConfig:
    """What a run reads, and what becomes of it on its way into the model."""

    sources: list[SourceConfig] = field(  # what is read; unless set, images, texts and pairs of the world
        default_factory=lambda: [SourceConfig(kind="image"), SourceConfig(kind="text"), SourceConfig(kind="pair")]
    )
    world: WorldConfig = field(default_factory=WorldConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    visual_tokenizer: VisualTokenizerConfig = field(default_factory=VisualTokenizerConfig)
    workers: int = 1  # processes that prepare batches; 0: the one that trains
    max_bad_share: float = 0.01  # the run fails when more than this share of samples had to be skipped
    max_pixels: int = 64_000_000  # larger images are refused before they are decoded


# --------------------------------------------------------------------------------------------------------------- train
@dataclass
class GuardConfig:
    """The autopilot, see `vlmoe.train.guard`. Off, a loss that is no number ends the run."""

    on: bool = True  # whether it acts
    every: int = 10  # steps between two looks
    spike: float = 8.0  # an update is held back when the loss is so many robust deviations above its running median
    patience: int = 20  # updates held back in a row before the run is rolled back to its last checkpoint
    max_roll_backs: int = 3  # roll-backs without progress, before the run is given up or its higher loss accepted
    dead_after: int = 200  # steps without a token after which an expert is revived
    collapse: float = 0.7  # share of the way from even load to one expert for all: there the balance losses are raised
    max_pressure: float = 16.0  # most that it multiplies the balance losses by


@dataclass
class TrainConfig:
    """The optimiser (AdamW), its learning rate, and how often things are done."""

    steps: int = 1000  # updates of the weights
    lr: float = 1e-3  # the highest learning rate, reached after the warm-up
    expert_lr: float = 1.0  # factor on lr for routed experts: each learns from k / E of the tokens
    router_lr: float = 1.0  # factor on lr for routers
    patch_lr: float | None = None  # factor on lr for the projection of patches; null: width over inputs, at most 1
    min_lr: float = 1e-5  # the learning rate of the last step
    warmup: int = 100  # steps in which the learning rate grows from 0 to lr
    schedule: str = "cosine"  # cosine, down to min_lr; or constant_decay: constant, then a straight line
    decay_steps: int = 0  # of constant_decay, the last ones of `steps`
    beta1: float = 0.9  # of AdamW: how slowly its mean of gradients forgets
    beta2: float = 0.98  # of AdamW: how slowly its mean of squared gradients forgets
    eps: float = 1e-6  # of AdamW: added to the root of that mean
    weight_decay: float = 0.05  # of AdamW
    clip: float = 3.0  # largest gradient norm; 0 turns clipping off
    accumulate: int = 1  # micro-batches in a step
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    precision: str = "auto"  # auto: bf16 autocast on CUDA, fp32 elsewhere; or fp32, bf16
    compile: bool = False  # with torch.compile
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch_every: int = 50  # steps between two looks at the routers (routing.jsonl, TensorBoard, warnings); 0: never
    log_every: int = 1  # steps between two lines of metrics.jsonl
    checkpoint_every: int = 500  # steps between two checkpoints
    keep: int = 2  # newest checkpoints kept
    keep_at: list[int] = field(default_factory=list)  # steps whose checkpoints are kept as well


@dataclass
class EvalConfig:
    """The scores at the end of a run."""

    samples: int = 512  # held-out samples of each split
    every: int = 0  # steps between two scores of the held-out losses while the run trains; 0: none
    batch: int = 64  # samples at a time
    pictures: int = 6  # completions shown beside their picture


@dataclass
class RunConfig:
    """Where a run keeps its files."""

    dir: str = ""  # the run's folder; running again with the same folder resumes. Empty: runs/NAME


@dataclass
class Recipe:
    """A pre-training run."""

    name: str = ""  # empty: that of the recipe's file
    about: str = ""  # what it is, its command, time, hardware and the score it reached
    init: str = ""  # an earlier pre-training to start from; where it is dense and this sparse, its layers fill experts
    branch_from: str = ""  # a kept checkpoint of another run, to go on from as that run would: RUN/checkpoints/step-N
    init_allow_inexact: bool = False  # also where the sparse model then does not compute what the dense one does
    seed: int = 0  # of weights, order of the data and masks
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def reads_texts(self) -> bool:
        """Whether the run sees any text, alone or in pairs."""
        return bool(self.data.batch.text or self.data.batch.pair)

    @property
    def reads_images(self) -> bool:
        """Whether the run sees any image, alone or in pairs."""
        return bool(self.data.batch.image or self.data.batch.pair)

    @property
    def predicts_patches(self) -> bool:
        """Whether the run hides patches, whose codes a visual tokenizer must give."""
        return bool(self.data.batch.image or (self.data.batch.pair and self.data.masking.pair_patches))


@functools.cache  # a plan asks a million times
def sparse_blocks(pattern: str, depth: int) -> frozenset[int]:
    """Block indices that a `sparse` pattern names. Raises ValueError saying what is accepted."""
    named = {
        "none": range(0),
        "all": range(depth),
        "odd": range(1, depth, 2),
        "even": range(0, depth, 2),
        "last": range(depth - 1, depth),
    }
    if pattern in named:
        return frozenset(named[pattern])
    wanted = f"{', '.join(named)} or block numbers below {depth} like '1,3'"
    try:
        blocks = frozenset(int(part) for part in pattern.split(","))
    except ValueError:
        raise ValueError(wanted) from None
    if not blocks or min(blocks) < 0 or max(blocks) >= depth:
        raise ValueError(wanted)
    return blocks
