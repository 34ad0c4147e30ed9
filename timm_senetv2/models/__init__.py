"""The models, in timm's registry once this is imported."""

import timm.models  # noqa: F401  first: importing it registers our models, which would meet half-imported modules below

from .cifar import CifarResNet as CifarResNet
from .small_cnn import SmallCNN as SmallCNN

__all__ = ['CifarResNet', 'SmallCNN']
