from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quick_jobs() -> Iterator[None]:
    """The curves of a job's run take longer to draw than the run to train."""
    from vlmoe.study import schedule

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "IMPORTED", (*schedule.IMPORTED, "tests.train.warm"))
        yield
