"""What the processes of `processes.py` need, imported once."""

import timm  # noqa: F401
import torch

import experiments.grid  # noqa: F401
import experiments.imagenet_subset  # noqa: F401
import experiments.markdown  # noqa: F401
import experiments.quickstart  # noqa: F401
import timm_senetv2.hub
import timm_senetv2.models  # noqa: F401

torch.set_num_threads(1)
