"""The models, in timm's registry once this is imported."""
from .cifar import CifarResNet as CifarResNet
from .small_cnn import SmallCNN as SmallCNN

__all__ = ['CifarResNet', 'SmallCNN']
