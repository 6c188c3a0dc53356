"""What has been verified on which GPU: ``auto`` runs a kernel there only if it was, and only where it measured fastest.

``verified.json`` holds, for each architecture, what a GPU run found for each class of calls::

    {"sm_90": {"bottleneck_mse_loss bfloat16 rank<=64 rows>=16384": {
        "verified": ["cuda", "triton"], "fastest": "triton", "source": "bench/results/gpu-sm_90.json"}}}

``verified`` are the backends whose every result kept the accuracy contract, ``fastest`` is the fastest of these and
``"reference"``, ``source`` the committed measurement. The file is in the package so that an installed wheel knows it.
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
    name = architecture(device) if findings else "this architecture"
    finding = findings.get(name, {}).get(call_class(call))
    if finding is None or backend not in finding["verified"]:
        return f"its results on such calls are not yet verified on {name}"
    fastest = finding["fastest"]
    return None if fastest == backend else f"{fastest} measured faster on such calls on {name}"


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
