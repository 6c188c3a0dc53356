"""Compression of whole models: data-aware, gated by latency, with recovery and a report."""

from .compress import compress
from .recover import Recovery
from .report import CompressionReport, LayerReport

__all__ = ["CompressionReport", "LayerReport", "Recovery", "compress"]
