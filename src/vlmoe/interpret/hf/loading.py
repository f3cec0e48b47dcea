"""Models of transformers from a folder: its own files and nothing else, no downloads, no pickles, no code of others."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vlmoe.config import UserError, read_json
from vlmoe.data.images import SUFFIXES
from vlmoe.interpret.hf.adapters import adapter_for
from vlmoe.interpret.hf.subject import HFSubject, marks_of

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
MAX_TEXTS = 100_000  # lines; a larger file was hardly meant


def load_hf(path: str | Path, device: str = "cpu", **options: Any) -> HFSubject:
    """The model in a folder of transformers' own format, with its tokenizer and, if it sees images, their processor.

    device: "cpu", "cuda", ... On the CPU weights are float32, which is much the fastest there; elsewhere as saved.
    options: of `HFSubject`.

    Raises:
        UserError: no such folder, no or an unknown config.json, no safetensors, missing weights, no tokenizer, a type
            without adapter, a dense model, or no transformers installed.
    """
    try:
        transformers: Any = import_module("transformers")
    except ImportError:
        raise UserError("models of transformers need it installed: pip install 'vlmoe[hf]'") from None
    where, folder = _device(device), Path(path)
    config = _config(folder)
    if options.get("adapter") is None:
        adapter_for(config)  # before the weights are read, which takes long
    _check_weights(folder)
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    maker = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    tokenizer = _read(folder, "tokenizer", transformers.AutoTokenizer)
    kept: dict[str, Any] = {}
    if _method(config) == "mxfp4":  # its own kernels take the experts' place and show no decision
        kept["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    dtype = torch.float32 if where.type == "cpu" else "auto"
    try:
        model, told = maker.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL, **kept
        )
    except Exception as error:  # nearly anything, by the format of the weights and what is wrong with them
        raise UserError(f"{folder}: weights could not be read: {_line(error)}") from None
    missing = sorted(told["missing_keys"])
    if missing:  # transformers would go on with random ones
        raise UserError(f"{folder}: the files lack {len(missing)} of the model's weights, {missing[0]} for one")
    processor = _processor(folder, config) if sees else None
    return HFSubject(model.to(where), tokenizer, processor, **options)


def _device(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r}: {_line(error)}") from None


def _config(folder: Path) -> Any:
    transformers: Any = import_module("transformers")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a model in transformers' format (nothing is downloaded)")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; expected a model in transformers' format")
    try:
        given = read_json(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not given.get("model_type"):
        raise UserError(f"{file}: key 'model_type': expected a type of model of transformers, got none")
    try:
        return transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: type {given['model_type']!r}: {_line(error)}") from None


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    about = f"; {pickled[0]} is a pickle, which is not read" if pickled else ""
    raise UserError(f"{folder}: expected weights as *.safetensors, found none{about}")


def _method(config: Any) -> str:
    given = getattr(config, "quantization_config", None) or {}
    return str(given.get("quant_method", "") if isinstance(given, dict) else getattr(given, "quant_method", ""))


def _read(folder: Path, what: str, maker: Any) -> Any:
    try:
        return maker.from_pretrained(folder, **LOCAL)
    except Exception as error:  # readers of tokenizers and processors raise nearly anything
        raise UserError(f"{folder}: no {what} that can be read: {_line(error)}") from None


def _processor(folder: Path, config: Any) -> Any:
    """What the model needs for images. Where an image is a grid between marks its image processor will do, which works
    without torchvision; None where nothing can be read: texts work still, images get an error."""
    transformers: Any = import_module("transformers")
    grid = marks_of(config) is not None
    try:
        return _read(folder, "processor", transformers.AutoImageProcessor if grid else transformers.AutoProcessor)
    except UserError:
        return None


def read_texts(file: Path) -> list[str]:
    """Texts of a UTF-8 file, one a line; blank lines are left out.

    Raises:
        UserError: no such file, not UTF-8, no text in it, more than 100,000.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected UTF-8 text: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    texts = [line for line in lines if line]
    if not texts:
        raise UserError(f"{file}: expected a text on each line, found none")
    if len(texts) > MAX_TEXTS:
        raise UserError(f"{file}: expected at most {MAX_TEXTS} texts, found {len(texts)}")
    return texts


def read_images(folder: Path) -> list[Path]:
    """Image files of a folder, in the order of their names: the n-th belongs to the n-th text.

    Raises:
        UserError: no such folder, no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower().lstrip(".") in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found none")
    return files


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
