"""Pre-training from a recipe: tokenizers first, then the loop, then the weights as plain files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmoe.config import Recipe
from vlmoe.data.loader import StepData, held_out, sample_texts
from vlmoe.data.text_tokenizer import TextTokenizer, build_text_tokenizer, load_text_tokenizer
from vlmoe.data.visual_tokenizer import VisualTokenizer, VQTokenizer, train_vq
from vlmoe.tasks.export import export, load_visual_tokenizer
from vlmoe.tasks.pretrain import MaskedDataModelling
from vlmoe.train.loop import TrainResult, train
