"""Every Triton kernel against the float64 oracle, without a GPU: in Triton's interpreter.

Known ways in which the interpreter is not the device: it computes products of float32 in float32 whatever precision
they ask for, so that bf16x6, and matrix units that truncate, are not seen; it multiplies bfloat16 as integers and
truncates when it narrows to it, which the kernels put right themselves (kernels/arithmetic.py), so that no tolerance is
widened.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# What of the contract tests of all backends runs here. The whole of it takes the interpreter half an hour:
# TRITON_INTERPRET=1 python -m pytest -k triton
SELECTED = {
    "squared error": ("test_mse_loss.py", "triton and (test_contract or test_layouts) and mean and not float64"),
    "layer": (
        "test_bottleneck.py",
        "triton and test_contract and not over and not float64"
        " and ((gelu_tanh and untied and residual) or (silu and not untied and plain))",
    ),
    "step": (
        "test_bottleneck_mse_loss.py",
        "triton and test_contract_over_residual_ratios and not target and not float64"
        " and ((float32 and (1.0 or 0.001)) or (float16 and not untied and (1.0 or 0.0001)))",
    ),
    "kernels": ("triton/interpreted.py", ""),
}


@pytest.mark.parametrize("name", SELECTED)
def test_in_the_interpreter(name: str) -> None:
    file, expression = SELECTED[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / file), "-k", expression],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
