"""Signals that end a run as a wish to stop, not as an exception somewhere in a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from vlmoe.data.workers import STOP_SIGNALS


class StopRequest:
    """While entered, the first of `STOP_SIGNALS` sets `number`; the second ends the process at once.

    What the process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in a shell's background. Outside
    the main thread Python allows no handlers: signals then act as before and `number` stays None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._on_signal) for s in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for s in self._before:
            signal.signal(s, signal.SIG_DFL)
