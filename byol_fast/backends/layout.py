"""How tensors lie in memory: what kernels need to walk them without a copy."""

from __future__ import annotations

from torch import Tensor


def collapse(*tensors: Tensor) -> tuple[int, int, list[Tensor]]:
    """Tensors of one shape as matrices of one shape with contiguous rows, without a copy where strides allow it.

    Dimensions are visited from the innermost of the first tensor outwards and merged while all tensors step on evenly;
    two groups at most may remain, the inner one contiguous in every tensor. Else all are copied.
    """
    first = tensors[0]
    order = sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=lambda d: first.stride(d))
    groups: list[tuple[int, list[int]]] = []
    for dim in order:
        size, strides = first.shape[dim], [tensor.stride(dim) for tensor in tensors]
        if groups and strides == [step * groups[-1][0] for step in groups[-1][1]]:
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, strides))
    if not groups or any(step != 1 for step in groups[0][1]):
        groups.insert(0, (1, [1] * len(tensors)))
    if len(groups) > 2 or (len(groups) == 2 and groups[0][0] == 1):
        return 1, first.numel(), [tensor.contiguous().view(1, -1) for tensor in tensors]
    cols = groups[0][0]
    rows, steps = groups[1] if len(groups) == 2 else (1, [cols] * len(tensors))
    return rows, cols, [tensor.as_strided((rows, cols), (step, 1)) for tensor, step in zip(tensors, steps, strict=True)]
