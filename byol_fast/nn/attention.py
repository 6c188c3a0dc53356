"""Multi-head attention whose four projections are modules of their own, so that each can be replaced."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SplitAttention"]


class SplitAttention(nn.Module):
    """What :class:`torch.nn.MultiheadAttention` computes, with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    PyTorch's own keeps three projections in one parameter and calls none of them as a module. Arguments, shapes, masks
    and results of a call are the same; it has no fast path, so a :class:`torch.nn.TransformerEncoderLayer` around it
    runs operation by operation.

    Args:
        attention: module to take the projections from; it stays as it is.

    Raises:
        ValueError: it has ``add_bias_kv`` or ``add_zero_attn``.
    """

    # What torch.nn's transformer layers ask of their attention before they take their fast path.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("attention: expected add_bias_kv=False and add_zero_attn=False, got True")
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj: nn.Module = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        query, key, value = (
            projection(tensor).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, tensor in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(query.dtype, key_padding_mask, attn_mask, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            attention = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            output = attention @ value
            weights = attention.mean(dim=1) if average_attn_weights else attention
        else:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(
        self, dtype: torch.dtype, padding: Tensor | None, attention: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """What is added to the scores ``[N, heads, L, S]``; None is nothing."""
        if is_causal and attention is None:
            raise ValueError("attn_mask: expected a mask with is_causal=True, got None")
        mask = None
        if attention is not None:
            added = _additive(attention, dtype)
            mask = added.unflatten(0, (-1, self.num_heads)) if added.dim() == 3 else added
        if padding is not None:
            added = _additive(padding, dtype)[:, None, None, :]
            mask = added if mask is None else mask + added
        return mask


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    # A part of a parameter is frozen where the whole is.
    linear.weight.requires_grad_(weight.requires_grad)
    if bias is not None:
        linear.bias.requires_grad_(bias.requires_grad)
    return linear


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
