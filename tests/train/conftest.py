from __future__ import annotations

import pytest

from vlmoe.train import plots


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training the toy; `test_plots` does it."""
    for name in ("plot_curves", "plot_routing"):
        monkeypatch.setattr(plots, name, lambda run_dir: None)
