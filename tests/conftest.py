from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Files that take longest, whatever the number of their tests: begun first, so that none is left over for one worker.
SLOW = (
    "test_finetune.py", "tasks/test_downstream.py", "train/test_mixes.py", "study/test_branches.py",
    "study/test_study.py", "interpret/test_hf_models.py", "interpret/report/test_page.py", "study/test_stress.py",
    "test_own_data.py", "train/test_resume.py", "interpret/test_planted.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / file: n for n, file in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path, len(SLOW)))


@pytest.fixture(scope="module")
def no_plots() -> Iterator[None]:
    """A run's curves take longer to draw than the small runs of tests to train. `test_plots` and `test_cli` draw."""
    from vlmoe.train import plots

    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curves", "plot_routing"):
            patch.setattr(plots, name, lambda run_dir: None)
        yield
