"""The accuracy contract, and the operands it is tested on.

Truth is float64 on the same rounded inputs; an error is ‖out − truth‖ / ‖truth‖. What a backend returns may be off by
at most ``FACTOR`` times what eager PyTorch of the same dtype is off by, or by ``FLOOR`` if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from byol_fast import backends, reference

FLOOR = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-3, torch.float16: 3e-4}
FACTOR = {torch.float32: 2.0, torch.float64: 2.0, torch.bfloat16: 1.05, torch.float16: 1.05}
DTYPES = list(FLOOR)
ACTIVATIONS = list(reference.ACTIVATIONS)
# Of this machine, but for "gram", which has tests of its own (test_gram.py).
BACKENDS = [name for name, status in backends().items() if status.available and name != "gram"]
RATIOS = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]


def relative_error(out: Tensor, truth: Tensor) -> float:
    difference, norm = (out.double() - truth).norm().item(), truth.norm().item()
    return difference / norm if norm > 0 else difference


def assert_contract(out: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    """``out`` is as accurate as the contract demands, and has eager's dtype and shape."""
    assert out.dtype == eager.dtype, f"{what}: dtype {out.dtype}, eager's is {eager.dtype}"
    assert out.shape == eager.shape, f"{what}: shape {tuple(out.shape)}, eager's is {tuple(eager.shape)}"
    allowed = max(FLOOR[out.dtype], FACTOR[out.dtype] * relative_error(eager, truth))
    error = relative_error(out, truth)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


@dataclass(frozen=True)
class Operands:
    """The tensors of a call; None where absent."""

    input: Tensor
    encoder_weight: Tensor
    decoder_weight: Tensor | None = None
    encoder_bias: Tensor | None = None
    decoder_bias: Tensor | None = None
    target: Tensor | None = None

    NAMES = ("input", "encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias", "target")

    def present(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.NAMES if getattr(self, name) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        return replace(self, **{name: function(tensor) for name, tensor in self.present().items()})

    def call(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        """``function`` on these tensors, the target only where there is one."""
        positional = [getattr(self, name) for name in self.NAMES[:5]]
        if self.target is not None:
            options["target"] = self.target
        return function(*positional, **options)


def make_operands(
    rows: int = 257,
    in_features: int = 131,
    rank: int = 29,
    out_features: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    bias: bool = True,
    target: bool = False,
    activation: str = "identity",
    ratio: float = 1.0,
) -> Operands:
    """Operands of which the bottleneck misses about the share ``ratio`` of the target's energy.

    The default sizes are prime, and large enough for the norms of rounding errors to be no matter of luck.
    """
    out_features = in_features if out_features is None else out_features

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    if tied or (out_features == in_features and not target):
        # Rows of X in the span of an orthonormal basis are reproduced exactly; noise is missed, and what a small change
        # of the weights spoils: at the very optimum the gradients would be nothing but rounding.
        size = max(in_features, rank)
        basis = torch.linalg.qr(normal(size, size)).Q[:in_features, :rank]
        change = (ratio / in_features) ** 0.5
        decoder = basis + change * normal(in_features, rank)
        encoder = decoder.T if tied else basis.T + change * normal(rank, in_features)
    else:
        encoder, decoder = normal(rank, in_features) / in_features**0.5, normal(out_features, rank) / rank**0.5
    operands = Operands(
        input=normal(rows, rank) @ decoder.T if decoder.shape[0] == in_features else normal(rows, in_features),
        encoder_weight=encoder,
        decoder_weight=None if tied else decoder,
        encoder_bias=0.1 * normal(rank) if bias else None,
        decoder_bias=0.1 * normal(out_features) if bias else None,
    )
    if bias:
        # decode(encode(x)) = x for x = c·basisᵀ + bd − basis (be + …): shift the input so that the biases are met.
        shift = operands.decoder_bias if decoder.shape[0] == in_features else 0
        operands = replace(operands, input=operands.input + shift)
        if decoder.shape[0] == in_features and not target:
            operands = replace(operands, encoder_bias=-(encoder @ operands.decoder_bias))
    if target:
        clean = operands.call(reference.bottleneck, activation=activation)
        operands = replace(operands, target=clean + _noise(clean, ratio))
    else:
        operands = replace(operands, input=operands.input + _noise(operands.input, ratio))
    return operands.map(lambda tensor: tensor.to(dtype))


def _noise(signal: Tensor, ratio: float) -> Tensor:
    noise = torch.randn_like(signal)
    return noise * (ratio**0.5 * signal.norm() / noise.norm()) if signal.numel() else noise


def results(
    function: Callable[..., Tensor], operands: Operands, needs: Sequence[str] | None = None, **options: object
) -> dict[str, Tensor]:
    """The output, and the gradients of its sum's square-free contraction with a fixed cotangent, by name."""
    leaves = operands.map(lambda tensor: tensor.detach().clone())
    wanted = [name for name in leaves.present() if needs is None or name in needs]
    for name in wanted:
        getattr(leaves, name).requires_grad_()
    output = leaves.call(function, **options)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    if output.dim() == 0:
        cotangent = torch.ones_like(output)
    gradients = torch.autograd.grad(output, [getattr(leaves, name) for name in wanted], cotangent)
    return {"output": output.detach(), **{f"d_{name}": g for name, g in zip(wanted, gradients, strict=True)}}


def _in_another_order(oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The oracle with rows, features and code units reversed, and its output reversed back."""

    def call(*args: Tensor | None, target: Tensor | None = None, **options: object) -> Tensor:
        if target is not None:
            options["target"] = target.flip(list(range(target.dim())))
        output = oracle(*(arg if arg is None else arg.flip(list(range(arg.dim()))) for arg in args), **options)
        return output.flip(list(range(output.dim())))

    return call


def assert_all(
    function: Callable[..., Tensor], oracle: Callable[..., Tensor], operands: Operands, **options: object
) -> None:
    """Output and every gradient of ``function`` keep the contract; ``oracle`` gives eager's values and the truth."""
    out = results(function, operands, **options)
    eager = results(oracle, operands, **options)
    if operands.input.dtype == torch.float64:
        # Float64 cannot show its own rounding. Summing in another order shows how much there is.
        truth = results(_in_another_order(oracle), operands, **options)
    else:
        truth = results(oracle, operands.map(Tensor.double), **options)
    for name in out:
        assert_contract(out[name], eager[name], truth[name], name)
