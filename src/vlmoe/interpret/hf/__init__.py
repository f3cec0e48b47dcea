"""Adapters: sparse models of transformers as subjects of the recorder, the statistics, the causal tests and the report.

`load_hf(path)` reads a model from its folder; `HFSubject(model, tokenizer)` takes one that is in memory already.
"""

from vlmoe.interpret.hf.adapters import ADAPTERS, Adapter, BlockSite, adapter_for, register
from vlmoe.interpret.hf.loading import load_hf, read_images, read_texts
from vlmoe.interpret.hf.subject import HFBatch, HFSubject

__all__ = [
    "ADAPTERS",
    "Adapter",
    "BlockSite",
    "HFBatch",
    "HFSubject",
    "adapter_for",
    "load_hf",
    "read_images",
    "read_texts",
    "register",
]
