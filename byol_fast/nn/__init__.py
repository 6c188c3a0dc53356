"""Layers."""

from .attention import SplitAttention
from .bottleneck import Bottleneck, TiedDecoder
from .conv import BottleneckConv2d
from .embedding import BottleneckEmbedding
from .loss import MSELoss
from .replace import merge, replace_linear

__all__ = [
    "Bottleneck",
    "BottleneckConv2d",
    "BottleneckEmbedding",
    "MSELoss",
    "SplitAttention",
    "TiedDecoder",
    "merge",
    "replace_linear",
]
