"""The downstream tasks on the embedded world."""

from vlmoe.data.world.tasks.examples import WorldExamples, task_splits

__all__ = ["WorldExamples", "task_splits"]
