"""Compression of whole models: data-aware, gated by latency, with recovery and a report."""

from .analysis import Analysis
from .compress import compress
from .recover import Recovery
from .report import CompressionReport, LayerReport

__all__ = ["Analysis", "CompressionReport", "LayerReport", "Recovery", "compress"]
