"""What a person sees of a running loop: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Clock:
    """Time and tokens since some moment."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    waited: float = 0.0  # seconds, for data

    def rates(self) -> tuple[float, float, float]:
        """Seconds, tokens per second, share of the time spent waiting for data."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        return seconds, self.tokens / seconds, min(1.0, self.waited / seconds)


class Display:
    """Loss, throughput, time left and the share of time spent waiting for data, for a loop of `steps` steps."""

    def __init__(self, name: str, step: int, steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._name, self._first, self._steps = name or "train", step, steps
        self._began = time.perf_counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self._name, total=steps, completed=step, text="")

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True, style="yellow")

    def update(self, step: int, loss: float, tokens_per_second: float, wait_share: float) -> None:
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {wait_share:.0%} waiting for data"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.perf_counter() - self._began
        if step < self._steps and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = now / max(1, step - self._first) * (self._steps - step)
        self.say(f"{self._name}  step {step}/{self._steps}  {text}  {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
