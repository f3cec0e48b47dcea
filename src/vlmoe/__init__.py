"""Sparse mixture-of-experts vision-language models: pre-train, measure, look inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmoe.tasks.export import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # on first use, so that `import vlmoe` and the command line's --help stay quick
        from vlmoe.tasks.export import load

        return load
    raise AttributeError(f"module 'vlmoe' has no attribute '{name}'")
