"""What the accuracy contract is swept over, on the backend in force: the same operands for a machine's own backends and
for kernels that are emulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from contract import Operands, assert_all, make_operands, results
from torch import Tensor

import byol_fast as bf
from byol_fast import reference


def check_step(operands: Operands, **options: object) -> None:
    """The loss and its gradients keep the contract."""
    assert_all(bf.bottleneck_mse_loss, reference.bottleneck_mse_loss, operands, **options)


def check_layer(operands: Operands, **options: object) -> None:
    """The layer and its gradients keep the contract; a target is left out."""
    assert_all(bf.bottleneck, reference.bottleneck, replace(operands, target=None), **options)


def step_at_ratio(dtype: torch.dtype, tied: bool, ratio: float) -> None:
    check_step(make_operands(dtype=dtype, tied=tied, ratio=ratio), reduction="sum")


def step_with_a_target_at_ratio(dtype: torch.dtype, ratio: float) -> None:
    operands = make_operands(out_features=47, dtype=dtype, target=True, activation="tanh", ratio=ratio)
    # A mean this small would be subnormal in half precision, and its rounding all there is to see.
    check_step(operands, activation="tanh", reduction="sum")


def step_with_activation(activation: str, dtype: torch.dtype, **sizes: int) -> None:
    operands = make_operands(**sizes, dtype=dtype, activation=activation)
    check_step(operands, activation=activation, reduction="sum")


def step_of_shape(shape: tuple[int, ...], dtype: torch.dtype, tied: bool = False) -> None:
    check_step(make_operands(*shape, dtype=dtype, tied=tied))


def same_bits(function: Callable[..., Tensor], operands: Operands, times: int, **options: object) -> None:
    """The function gives the same bits so many times."""
    first = results(function, operands, **options)
    for _ in range(times - 1):
        again = results(function, operands, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def step_with_code_means(dtype: torch.dtype, tied: bool, centred_data: bool, spread: float) -> None:
    """Codes whose mean is 4 / ``spread`` times their standard deviation, and residuals that have none.

    The terms of the Gram form of dWd then grow with the number of rows, and dWd only with its root.
    """
    rows, features, rank = 9001, 150, 13

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    encoder = spread * normal(rank, features) / features**0.5
    decoder = encoder.T if tied else normal(features, rank) / rank**0.5
    mean = torch.zeros(features, dtype=torch.float64) if centred_data else 4 * normal(features)
    encoder_bias = 4 * normal(rank) if centred_data else torch.zeros(rank, dtype=torch.float64)
    operands = Operands(
        input=normal(rows, features) + mean,
        encoder_weight=encoder,
        decoder_weight=None if tied else decoder,
        encoder_bias=encoder_bias,
        decoder_bias=mean - decoder @ (encoder @ mean + encoder_bias),
    )
    check_step(operands.map(lambda tensor: tensor.to(dtype)), reduction="sum")
