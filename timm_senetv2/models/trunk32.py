"""What the 32-pixel trunks share: a 3x3 stem without pooling, three stages, a pooled classifier, timm's model API."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import checkpoint_seq
from torch import nn

STAGES = ('layer1', 'layer2', 'layer3')


def _take_indices(count: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """timm's meaning of `indices` over `count` features: the last n if an int, all if None. And the largest."""
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f'indices must be a number of features from 1 to {count}, got {indices}')
        take = list(range(count - indices, count))
    else:
        take = [i + count if i < 0 else i for i in indices]
        if not take or not all(0 <= i < count for i in take):
            raise ValueError(f'indices must lie in {-count} to {count - 1}, got {indices}')
    return take, max(take)


class Trunk32(nn.Module):
    """Base of the 32-pixel models.

    A subclass builds the stages; stage i keeps the resolution of the one before it (i = 1) or halves it (i = 2, 3).
    Features are NCHW at reductions 1 (stem), 1, 2 and 4.
    """

    checkpoint_whole_stages = False  # True where the modules of a stage work in place on each other's outputs

    def __init__(
        self,
        stages: Callable[[int, dict[str, Any]], list[tuple[nn.Sequential, int]]],
        stem_width: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            stages: Called with the stem's width and the factory arguments (device, dtype); returns the three stages,
                each with the number of channels it puts out.
            stem_width: Channels of the stem.
            num_classes: Classes; 0 leaves the classifier out.
            in_chans: Channels of the images.
            global_pool: timm's pooling type: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
            drop_rate: Dropout before the classifier.
            device: Device of parameters and buffers.
            dtype: Dtype of parameters and buffers.
        """
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=stem_width, reduction=1, module='act1')]
        width = stem_width
        for name, (stage, width), reduction in zip(STAGES, stages(stem_width, dd), (1, 2, 4), strict=True):
            self.add_module(name, stage)
            self.feature_info.append(dict(num_chs=width, reduction=reduction, module=name))

        self.num_features = width
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = width * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise as the SEANet authors do: convs Kaiming-normal over fan-in; the last norms are not zeroed."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group parameters for layer-wise learning-rate decay: by block, or with `coarse` by stage."""
        return dict(stem=r'^conv1|^bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute the activations of each block or stage in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def _checkpointed(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_seq(stage, x, every=max(1, len(stage)) if self.checkpoint_whole_stages else 1)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or with `name_only` its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier in place.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: timm's pooling type; None keeps the present one.
        """
        weight = self.conv1.weight
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, device=weight.device, dtype=weight.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the trunk and collect the outputs of the stem (index 0) and the stages (1, 2, 3).

        Args:
            x: Images, (N, in_chans, H, W).
            indices: The last n if an int, all if None, else those listed.
            norm: For timm's interface; there is no norm to apply.
            stop_early: Do not run past the last stage asked for.
            output_fmt: 'NCHW', nothing else.
            intermediates_only: Return the list alone.

        Returns:
            The final features and the list, or the list.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = _take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        for index, name in enumerate(STAGES[:max_index] if stop_early else STAGES, start=1):
            stage = getattr(self, name)
            x = self._checkpointed(stage, x) if self.grad_checkpointing else stage(x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages that the listed intermediates do not need, and the classifier with them.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: For timm's interface; there is no norm to drop.
            prune_head: Drop the classifier even where every stage stays.

        Returns:
            The indices that are kept.
        """
        take_indices, max_index = _take_indices(len(self.feature_info), indices)
        for name in STAGES[max_index:]:
            setattr(self, name, nn.Sequential())
        if max_index < len(STAGES):
            self.num_features = self.feature_info[max_index]['num_chs']
            prune_head = True  # the classifier is sized for the last stage
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, num_features, H / 4, W / 4)."""
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for name in STAGES:
                x = self._checkpointed(getattr(self, name), x)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify; with `pre_logits` stop before the classifier."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to logits, (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
