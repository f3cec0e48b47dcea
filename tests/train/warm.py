"""Imported by the fork server: what a launch needs and is slow to import. It must not start threads."""

import torch._dynamo  # the first optimizer imports it
import torch.utils.tensorboard  # noqa: F401

import tests.train.launch  # noqa: F401
