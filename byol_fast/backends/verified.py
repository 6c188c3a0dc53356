"""What has been verified on which GPU: ``auto`` runs a kernel there only if it was, and only where it measured fastest.

``verified.json`` holds, for each architecture, what a GPU run found for each class of calls::

    {"sm_90": {"bottleneck_mse_loss bfloat16 rank<=64 rows>=16384": {
        "verified": ["cuda", "triton"], "fastest": "triton", "source": "bench/results/gpu-sm_90.json"}}}

``verified`` are the backends whose every result kept the accuracy contract, ``fastest`` is the fastest of these and
``"reference"``, ``source`` the committed measurement. The file is in the package so that an installed wheel knows it.

Where nothing is known, PyTorch remains. Of its two routes, ``"gram"`` is made of its own products, which need no
verification, and is taken where it must win by count: large steps in half precision (:func:`reason_against`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch

from .base import Call

_RANKS = (16, 32, 64, 128, 256)
_ROWS = (16384, 1024)
# The route that is PyTorch's own products, and the elements of the data from which on it should win: it has about 25
# launches of some 5 µs, while eager's 13 passes over so much in half precision take 200 µs at 4.3 TB/s.
_FRAMEWORK, _LARGE = "gram", 2**25
_HALF = (torch.bfloat16, torch.float16)
# Kernels of our own: a GPU has to show that they are right.
_UNPROVEN = ("cuda", "triton")


class Finding(TypedDict):
    """What a GPU run found for a class of calls."""

    verified: list[str]
    fastest: str
    source: str


Findings = Mapping[str, Mapping[str, Finding]]

# Read with the package, not at first use: `torch.compile` cannot trace the reading of a file.
_FINDINGS: Findings = json.loads(Path(__file__).with_name("verified.json").read_text(encoding="utf-8"))


def reason_against(backend: str, call: Call, device: torch.device, findings: Findings = _FINDINGS) -> str | None:
    """None, or why ``auto`` must not run the call on this backend and device. Off GPUs there is never a reason."""
    if device.type != "cuda":
        return None
    finding = _finding(call, device, findings)
    if finding is None and backend == _FRAMEWORK:
        return _no_less_work(call)
    if finding is None or backend not in finding["verified"]:
        name = architecture(device) if findings else "this architecture"
        return f"its results on such calls are not yet verified on {name}"
    fastest = finding["fastest"]
    return None if fastest == backend else f"{fastest} measured faster on such calls on {architecture(device)}"


def reason_for(call: Call, device: torch.device, findings: Findings = _FINDINGS) -> str:
    """Why ``auto`` runs the call on a backend that :func:`reason_against` has nothing against."""
    if device.type != "cuda":
        return "measured fastest on such calls"
    finding = _finding(call, device, findings)
    if finding is None:
        return "it moves a third of the bytes of eager PyTorch in fewer operations, by count and not yet measured here"
    return f"measured fastest on such calls on {architecture(device)} ({finding['source']})"


def caveat(backend: str, device: torch.device, findings: Findings = _FINDINGS) -> str | None:
    """None, or what to know of kernels no call of which is verified on a GPU."""
    if device.type != "cuda" or backend not in _UNPROVEN:
        return None
    name = architecture(device)
    if any(backend in finding["verified"] for finding in findings.get(name, {}).values()):
        return None
    return f"unverified on {name}: only use_backend({backend!r}) runs it"


def _finding(call: Call, device: torch.device, findings: Findings) -> Finding | None:
    return findings.get(architecture(device), {}).get(call_class(call)) if findings else None


def _no_less_work(call: Call) -> str | None:
    """None, or why the Gram route may not be expected to beat eager PyTorch: docs/accuracy.md counts the operations."""
    if call.dtype not in _HALF:
        return "in this dtype it reads a number back from the device, and what that costs is not yet measured"
    features = min(call.in_features, call.out_features)
    if call.rows * features < _LARGE:
        return f"below {_LARGE} elements its launches may take longer than eager PyTorch's passes"
    if 2 * call.rank * (features + call.rows) >= features * call.rows:
        return "at such a rank it takes more operations than eager PyTorch"
    return None


def call_class(call: Call) -> str:
    """Calls of one class share a verification: operation, dtype, and how large the rank and the number of rows are."""
    rank = next((f"rank<={bound}" for bound in _RANKS if call.rank <= bound), f"rank>{_RANKS[-1]}")
    rows = next((f"rows>={bound}" for bound in _ROWS if call.rows >= bound), f"rows<{_ROWS[-1]}")
    sparse = "sparse " if call.sparse else ""
    return f"{sparse}{call.operation} {str(call.dtype).removeprefix('torch.')} {rank} {rows}"


# For the compiler, which cannot trace the question, the answer is a constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def architecture(device: torch.device) -> str:
    """``sm_90`` for compute capability 9.0, ``gfx942`` for such an AMD GPU."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
