"""byol_fast: bottleneck layers for PyTorch (Bottleneck Yield Optimization Layer)."""

from . import functional, nn
from ._version import __version__
from .backends import BackendError, backends, use_backend
from .compression import CompressionReport, Recovery, compress
from .curve import YieldCurve, allocate_ranks
from .functional import Explanation, bottleneck, bottleneck_mse_loss, explain, mse_loss
from .nn import Bottleneck, BottleneckConv2d, BottleneckEmbedding, MSELoss, merge, replace_linear
from .pca import StreamingPCA, certificate
from .phases import FinetuneResult, PretrainResult, cache_codes, deploy, finetune, load, pretrain
from .recommend import Recommendations, Recommender
from .svd import truncated_svd

__all__ = [
    "BackendError",
    "Bottleneck",
    "BottleneckConv2d",
    "BottleneckEmbedding",
    "CompressionReport",
    "Explanation",
    "FinetuneResult",
    "MSELoss",
    "PretrainResult",
    "Recommendations",
    "Recommender",
    "Recovery",
    "StreamingPCA",
    "YieldCurve",
    "__version__",
    "allocate_ranks",
    "backends",
    "bottleneck",
    "bottleneck_mse_loss",
    "cache_codes",
    "certificate",
    "compress",
    "deploy",
    "explain",
    "finetune",
    "functional",
    "load",
    "merge",
    "mse_loss",
    "nn",
    "pretrain",
    "replace_linear",
    "truncated_svd",
    "use_backend",
]
