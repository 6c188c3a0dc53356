"""The tools of the tests: a wrong value must fail the contract, and the operands must be as hard as they claim."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from contract import DTYPES, FLOOR, RATIOS, assert_all, assert_contract, make_operands

from byol_fast import reference


def residual_ratio(**options: object) -> float:
    """‖R‖²/‖A‖² of the operands."""
    operands = make_operands(dtype=torch.float64, **options)
    target = operands.input if operands.target is None else operands.target
    output = replace(operands, target=None).call(reference.bottleneck)
    centred = target if operands.decoder_bias is None else target - operands.decoder_bias
    return ((output - target).square().sum() / centred.square().sum()).item()


@pytest.mark.parametrize("ratio", RATIOS)
def test_operands_have_the_residual_ratio_asked_for(ratio: float) -> None:
    for tied, bias, target in product([False, True], repeat=3):
        got = residual_ratio(tied=tied, bias=bias, target=target, ratio=ratio)
        assert ratio / 3 < got < 3 * ratio, f"tied={tied}, bias={bias}, target={target}: {got:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_refuses_what_is_wrong(dtype: torch.dtype) -> None:
    truth = torch.randn(50, dtype=torch.float64)
    good = truth.to(dtype)
    assert_contract(good, good, truth, "good")
    with pytest.raises(AssertionError, match="wrong: relative error"):
        assert_contract((good * (1 + 10 * FLOOR[dtype])).to(dtype), good, truth, "wrong")
    missing = good.clone()
    missing[3] = float("nan")
    with pytest.raises(AssertionError, match="missing: relative error nan"):
        assert_contract(missing, good, truth, "missing")
    with pytest.raises(AssertionError, match="shape"):
        assert_contract(good[:49], good, truth, "short")
    with pytest.raises(AssertionError, match="dtype"):
        assert_contract(good.to(torch.float32 if dtype == torch.float64 else torch.float64), good, truth, "promoted")


# What a wrong formula would compute; each must be seen in the very gradient that it spoils.
MISTAKES = {
    "output": lambda loss, o: 1.01 * loss,
    "d_input": lambda loss, o: loss + 0.01 * (o.input - o.input.detach()).sum(),
    "d_encoder_bias": lambda loss, o: loss + (o.encoder_bias - o.encoder_bias.detach()).sum(),
    "d_decoder_bias": lambda loss, o: loss + (o.decoder_bias - o.decoder_bias.detach()).sum(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_one_result_is_seen(name: str) -> None:
    operands = make_operands()

    def mistaken(*args: torch.Tensor, **options: object) -> torch.Tensor:
        given = replace(operands, **dict(zip(operands.NAMES, args, strict=False)))
        return MISTAKES[name](reference.bottleneck_mse_loss(*args, **options), given)

    with pytest.raises(AssertionError, match=f"^{name}: relative error"):
        assert_all(mistaken, reference.bottleneck_mse_loss, operands)


def test_uninitialised_memory_is_poisoned() -> None:
    x = torch.zeros(2, 3)
    allocated = [torch.empty(2, 3), torch.empty_like(x), x.new_empty(2, 3), x.new_empty((2, 3), dtype=torch.float16)]
    for tensor in allocated:
        assert tensor.isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
