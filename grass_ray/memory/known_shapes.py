"""Run operations on the meta device, where most of the time goes into working out the shape of the result.

A step asks for the same few hundred shapes thousands of times, so they are remembered::

    result = call(torch.ops.aten.mul.Tensor, (left, right), {})
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# size, strides and dtype of each tensor of the result; None where it is not always new memory of that size
_Spec = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
_known: dict[Hashable, _Spec | None] = {}


def call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what ``func(*args, **kwargs)`` returns: an operation as a dispatch mode gets it, on meta tensors."""
    if not _allocates(func):
        return func(*args, **kwargs)
    try:
        key = (func, _described(args), _described(tuple(kwargs.items())))
        spec = _known.get(key)
    except TypeError:  # an argument that cannot be hashed
        return func(*args, **kwargs)
    if spec is None:
        result = func(*args, **kwargs)
        if key not in _known:
            _known[key] = _spec_of(result, args, kwargs)
        return result
    made = tuple(torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in spec)
    return made[0] if len(func._schema.returns) == 1 else made


@cache
def _allocates(func: Any) -> bool:
    """Whether an operation returns tensors alone, and neither changes nor returns what it was given."""
    returns = func._schema.returns
    new = all(str(value.type) == "Tensor" and value.alias_info is None for value in returns)
    return bool(returns) and new and not func._schema.is_mutable


def _described(value: Any) -> Hashable:
    """What decides the result's shape. 1, 1.0 and True are equal, but give results of other dtypes."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value


def _spec_of(result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Spec | None:
    tensors = result if isinstance(result, (list, tuple)) else (result,)
    given = {t.untyped_storage()._cdata for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
    spec = []
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_meta or tensor.untyped_storage()._cdata in given:
            return None
        alike = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if alike.untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
        spec.append((tensor.shape, tensor.stride(), tensor.dtype))
    return tuple(spec)
