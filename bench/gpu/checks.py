"""Is every kernel right on this device? Each check is a function of a backend's name that raises where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from contract import ACTIVATIONS, RATIOS, Operands, assert_all, make_operands, relative_error, results

import byol_fast as bf
from byol_fast import reference
from byol_fast.backends import Call, verified

from .device import DEVICE, REHEARSAL, synchronise

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Shapes of every class of calls that is timed, and ragged ones.
# Those of 1024 and 8192 columns, whose rows begin at multiples of 16 bytes, are one pass on Hopper in half precision,
# by clusters of two and of sixteen blocks; with tied weights that of 768, too.
SHAPES = [(1000, 515, 13), (4099, 1030, 32), (4096, 1024, 32), (16385, 768, 64), (2000, 300, 100), (1031, 8192, 27)]
if REHEARSAL:
    SHAPES = [(40, 70, 13), (65, 72, 8)]
WEIGHTS = ("encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias")

Check = Callable[[], None]


def checks(backend: str) -> Iterator[tuple[str, set[str], Check]]:
    """Name, the classes of calls whose verification rests on it, and the check itself, most telling first."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        yield f"squared error, {name}", _classes("mse_loss", dtype), partial(_squared_error, dtype)
        for shape in SHAPES:
            words = f"{name}, {shape}"
            step, layer = _classes("bottleneck_mse_loss", dtype, shape), _classes("bottleneck", dtype, shape)
            for tied in (False, True):
                kind = "tied" if tied else "untied"
                yield f"step, {kind}, {words}", step, partial(_step, shape, dtype, tied=tied)
                yield f"layer, {kind}, {words}", layer, partial(_layer, shape, dtype, tied=tied)
            yield f"step, target, {words}", step, partial(_step, shape, dtype, target=True)
        every = _classes("bottleneck_mse_loss", dtype)
        for ratio in RATIOS[3:4] if REHEARSAL else RATIOS:
            yield f"step, {name}, missing {ratio:g}", every, partial(_step, SHAPES[0], dtype, ratio=ratio)
        for activation in ACTIVATIONS[:2] if REHEARSAL else ACTIVATIONS:
            yield f"step, {name}, {activation}", every, partial(_step, SHAPES[0], dtype, activation=activation)
            yield (
                f"layer, {name}, {activation}",
                _classes("bottleneck", dtype),
                partial(_layer, SHAPES[0], dtype, activation=activation),
            )
        if dtype == torch.float32 and not REHEARSAL:
            # Eager rounds to tf32 on a GPU only.
            for ratio in (1.0, 1e-3, 1e-6):
                check = partial(_step, SHAPES[0], dtype, ratio=ratio)
                yield f"step, tf32, missing {ratio:g}", every, partial(_in_tf32, check)
            yield "layer, tf32", _classes("bottleneck", dtype), partial(_in_tf32, partial(_layer, SHAPES[0], dtype))
        yield f"offsets beyond 2^31, {name}", every, partial(_long, dtype)
        yield f"bit-equal over runs, {name}", every, partial(_bit_equal, dtype)
        if not REHEARSAL and backend != "gram":
            yield f"no host synchronisation, {name}", every, partial(_no_synchronisation, dtype)
            yield f"CUDA graph replay, {name}", every, partial(_graph, dtype)


def every_class() -> set[str]:
    """Of all operations and dtypes."""
    operations = ("mse_loss", "bottleneck", "bottleneck_mse_loss")
    return {name for operation in operations for dtype in DTYPES for name in _classes(operation, dtype)}


def _classes(operation: str, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> set[str]:
    """The class of one shape, or all of an operation and dtype: a failure there spoils them all."""
    if shape is not None:
        return {verified.call_class(Call(operation, dtype, shape[0], shape[1], shape[1], shape[2]))}
    rows, ranks = (1, 1024, 16384), (1, 17, 33, 65, 129, 257)
    return {verified.call_class(Call(operation, dtype, n, 1, 1, k)) for n in rows for k in ranks}


def _operands(shape: tuple[int, int, int], **options: object) -> Operands:
    torch.manual_seed(0)
    return make_operands(*shape, **options).map(lambda tensor: tensor.to(DEVICE))  # type: ignore[arg-type]


def _step(shape: tuple[int, int, int], dtype: torch.dtype, activation: str = "identity", **options: object) -> None:
    operands = _operands(shape, dtype=dtype, activation=activation, **options)
    assert_all(bf.bottleneck_mse_loss, reference.bottleneck_mse_loss, operands, activation=activation, reduction="sum")


def _layer(shape: tuple[int, int, int], dtype: torch.dtype, activation: str = "identity", **options: object) -> None:
    operands = _operands(shape, dtype=dtype, **options)
    assert_all(bf.bottleneck, reference.bottleneck, operands, activation=activation, residual=True)


def _in_tf32(check: Check) -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check()
    finally:
        torch.set_float32_matmul_precision(precision)


def _squared_error(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((301, 97), (7,), (2, 3, 50)):
        x, t = (torch.randn(shape).to(dtype).to(DEVICE) for _ in range(2))
        ours, eager, truth = (
            _mse(function, a, b)
            for function, a, b in (
                (bf.mse_loss, x, t), (F.mse_loss, x, t), (F.mse_loss, x.double(), t.double()),
            )
        )  # fmt: skip
        for out, same, true in zip(ours, eager, truth, strict=True):
            from contract import assert_contract

            assert_contract(out, same, true, "mse_loss")


def _mse(function: Callable[..., torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    loss = function(x, t, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (x, t))


def _long(dtype: torch.dtype) -> None:
    """More than 2³¹ elements: the sums of the whole are the sums of its parts."""
    rows, features, rank = (200, 64, 5) if REHEARSAL else (2**21 + 2**14, 1024, 16)
    x = torch.empty(rows, features, dtype=dtype, device=DEVICE)
    for block in x.split(2**18):
        block.normal_()
    operands = _operands((2, features, rank), dtype=dtype)
    weights = [getattr(operands, name).detach().requires_grad_() for name in WEIGHTS]
    whole = _summed([x], weights)
    parts = _summed(list(x.split(-(-rows // 16))), weights)
    for name, out, truth in zip(("loss", *WEIGHTS), whole, parts, strict=True):
        error = relative_error(out, truth)
        assert error < 1e-2, f"{name}: {error:.2e} from the sum of its parts"


def _summed(inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    sums: list[torch.Tensor] = []
    for x in inputs:
        loss = bf.bottleneck_mse_loss(x, *weights) * (x.numel() / 2**21)
        results = [result.double() for result in (loss.detach(), *torch.autograd.grad(loss, weights))]
        sums = [a + b for a, b in zip(sums, results, strict=True)] if sums else results
    return sums


def _bit_equal(dtype: torch.dtype) -> None:
    operands = _operands((150, 60, 9) if REHEARSAL else (20000, 999, 41), dtype=dtype)
    first = results(bf.bottleneck_mse_loss, operands)
    for _ in range(1 if REHEARSAL else 10):
        again = results(bf.bottleneck_mse_loss, operands)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} differs between two runs"


def _no_synchronisation(dtype: torch.dtype) -> None:
    operands = _operands((2000, 512, 32), dtype=dtype).map(lambda tensor: tensor.requires_grad_())
    operands.call(bf.bottleneck_mse_loss).backward()
    synchronise()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operands.call(bf.bottleneck_mse_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _graph(dtype: torch.dtype) -> None:
    operands = _operands((2000, 512, 32), dtype=dtype)
    weights = [getattr(operands, name).detach().requires_grad_() for name in WEIGHTS]
    x = operands.input.clone()

    def step() -> list[torch.Tensor]:
        loss = bf.bottleneck_mse_loss(x, *weights)
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    captured, replay = capture(step)
    x.copy_(torch.randn_like(x))
    replay()
    for out, expected in zip(captured, step(), strict=True):
        assert torch.equal(out, expected), "a replayed graph gives another result than the call"


def capture(step: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """The results of a captured step, and what makes them anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return out, graph.replay
