"""Imported by the fork server: what a launch, or a job of a study, needs and is slow to import. It must not start
threads."""

import torch._dynamo  # the first optimizer imports it
import torch.utils.tensorboard  # noqa: F401

import tests.train.launch
import vlmoe.study.worker  # noqa: F401

tests.train.launch.draw_nothing()  # takes longer than training
