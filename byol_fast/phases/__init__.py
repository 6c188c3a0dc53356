"""The three phases: pre-train a bottleneck, fine-tune the model around it, deploy."""

from .deploy import deploy, load
from .finetune import FinetuneResult, finetune
from .latents import cache_codes
from .pretrain import PretrainResult, pretrain

__all__ = ["FinetuneResult", "PretrainResult", "cache_codes", "deploy", "finetune", "load", "pretrain"]
