"""The routing report: findings in, one HTML file out that opens from disk without a network."""

from vlmoe.interpret.report.build import build
from vlmoe.interpret.report.check import ReportError

__all__ = ["ReportError", "build"]
