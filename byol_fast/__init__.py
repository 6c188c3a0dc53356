"""byol_fast: bottleneck layers for PyTorch (Bottleneck Yield Optimization Layer)."""

from . import functional
from ._version import __version__
from .backends import BackendError, backends, use_backend
from .functional import Explanation, bottleneck, bottleneck_mse_loss, explain, mse_loss

__all__ = [
    "BackendError",
    "Explanation",
    "__version__",
    "backends",
    "bottleneck",
    "bottleneck_mse_loss",
    "explain",
    "functional",
    "mse_loss",
    "use_backend",
]
