"""A guard: no parameter is read but in its own module's forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn


@contextmanager
def only_in_own_forward(root: nn.Module) -> Iterator[None]:
    """Inside, reading a parameter of `root` raises AssertionError unless the module that holds it is at work. A module
    whose weights lie in pieces elsewhere has them whole only then."""
    watched, at_work, hooks = {id(m) for m in root.modules()}, list[nn.Module](), []
    for module in root.modules():
        hooks.append(module.register_forward_pre_hook(lambda m, _: at_work.append(m)))
        hooks.append(module.register_forward_hook(lambda m, *_: (at_work.pop(), None)[1], always_call=True))
    plain = nn.Module.__getattr__

    def guarded(self: nn.Module, name: str) -> Any:
        held = self.__dict__.get("_parameters", {})
        if held.get(name) is not None and id(self) in watched and not any(m is self for m in at_work):
            raise AssertionError(f"{type(self).__name__}.{name} is read outside its forward")
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__getattr__", guarded)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
