"""Run the head of a language model on chosen hidden states, so that no logits exist which nobody asked for.

The logits of a whole batch are often larger than everything else that a step keeps: a vocabulary has more entries than
a layer has features. Here they are computed for as few positions at a time as the caller likes::

    def greedy(hidden, head):
        return torch.cat([head(part).argmax(-1) for part in hidden.flatten(0, 1).split(head.chunk)])

    if splits(model):
        tokens = with_head(model, greedy, input_ids=ids)

What the head does is not looked up anywhere: it is what the model's own forward makes of the hidden states that its
decoder returns. Scales, soft caps, biases, tied weights and adapters on the head are therefore all in it, in models
with code of their own, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grass_ray.tasks.inference.keys_values import base_model

T = TypeVar("T")
# fewer rows of a matrix product do not keep a GPU busy; on one CPU thread 128 to 256 take the same time
CHUNK_POSITIONS = 192
# a small vocabulary leaves room for more positions than that
CHUNK_BYTES = 32 * 2**20
# largest difference of logits that rounding explains, relative to the largest logit
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
LOW_PRECISION_TOLERANCE = 2e-2
# the decoder of each model that was asked for; None if its head cannot be run on its own
_decoders: WeakKeyDictionary[Any, nn.Module | None] = WeakKeyDictionary()


class Head:
    """The head of a model inside one of its forwards. :func:`with_head` makes it.

    Args:
        base: the transformers model.
        forward: its forward, with all arguments but the decoder's result.
        body: what stands in for the forward of its decoder.
        nothing: the logits of no position.

    Attributes:
        chunk: number of positions whose logits are worth computing at once.
        parameters: the parameters that train and that the logits depend on, those of the decoder left out.
    """

    def __init__(self, base: nn.Module, forward: Callable[[], Any], body: _Body, nothing: Tensor) -> None:
        self._base = base
        self._forward = forward
        self._body = body
        self.chunk = max(CHUNK_POSITIONS, CHUNK_BYTES // (4 * nothing.shape[-1]))
        self.parameters = _leaves(nothing)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states of shape (positions, features), shape (positions, vocabulary)."""
        self._body.given = hidden.unsqueeze(0)
        return _logits(self._forward()).squeeze(0)

    @contextmanager
    def stand_ins(self) -> Iterator[list[Tensor]]:
        """Inside the block the head uses the returned leaves in place of its ``parameters``, with the same values.

        Their gradients can be taken part by part, and no hook on a parameter hears of it.
        """
        leaves = {p: p.detach().requires_grad_() for p in self.parameters}
        places = [
            (module, name, p)
            for module in (self._base.modules() if leaves else ())
            for name, p in module._parameters.items()
            if p in leaves
        ]
        if {p for _, _, p in places} != set(leaves):
            raise RuntimeError("the logits depend on a tensor that trains and is no parameter of the model")
        for module, name, parameter in places:
            module._parameters[name] = leaves[parameter]  # type: ignore[assignment]
        try:
            yield list(leaves.values())
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter


class _Body:
    """Stands in for the forward of a decoder: runs it once, then returns the hidden states it was given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._output: Any = None
        self.given: Tensor | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._output is None:
            self._output = self._forward(*args, **options)
            self.given = self.hidden[:, :0].detach()  # what the logits still depend on is the head's own
        if isinstance(self._output, tuple):
            return (self.given, *self._output[1:])
        return type(self._output)(**{**self._output, "last_hidden_state": self.given})

    @property
    def hidden(self) -> Tensor:
        """The hidden states that the decoder returned, shape (rows, positions, features)."""
        hidden: Tensor = self._output[0] if isinstance(self._output, tuple) else self._output.last_hidden_state
        return hidden


def with_head(model: Any, use: Callable[[Tensor, Head], T], **inputs: Any) -> T:
    """Call the model, and return what ``use`` makes of its last hidden states in place of the model's output.

    ``use`` runs inside the model's forward, where sharded weights are gathered.

    Args:
        model: a model for which :func:`splits` is true, possibly with adapters.
        use: called with the hidden states, shape (rows, positions, features), and the head. Virtual tokens of an
            adapter have positions, too.
        inputs: arguments of the model.
    """
    decoder = decoder_of(model)
    assert decoder is not None, "no head of its own: ask splits() first"
    return _with_head(model, decoder, use, inputs)


def splits(model: Any) -> bool:
    """Whether the head of the model can be run on its own. The first call for a model runs it on a few tokens.

    Warns once if it cannot: if logits are made of more than the decoder's last hidden state at their position.
    """
    return decoder_of(model) is not None


def decoder_of(model: Any) -> nn.Module | None:
    """The part of the model that makes the hidden states; None if the head cannot be run on its own."""
    base = base_model(model)
    if base not in _decoders:
        largest = max(base.children(), key=lambda part: sum(p.numel() for p in part.parameters()), default=None)
        candidates = (getattr(base, "get_decoder", lambda: None)(), largest)
        parts = (part for part in candidates if isinstance(part, nn.Module) and part is not base)
        _decoders[base] = next((part for part in parts if _feeds_the_head(model, part)), None)
        if _decoders[base] is None:
            warnings.warn(
                f"the logits of {type(base).__name__} are not made of the last hidden state at each position alone; "
                "all of a batch are computed at once, which takes more memory",
                stacklevel=3,
            )
    return _decoders[base]


def _with_head(model: Any, decoder: nn.Module, use: Callable[[Tensor, Head], T], inputs: dict[str, Any]) -> T:
    base = base_model(model)
    inner = base.forward

    def forward(*args: Any, **options: Any) -> T:
        body = _Body(decoder.forward)
        with _replaced_forward(decoder, body):
            nothing = _logits(inner(*args, **options))
            return use(body.hidden, Head(base, lambda: inner(*args, **options), body, nothing))

    with _replaced_forward(base, forward):
        result: T = model(**inputs)
    return result


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    held = vars(module)  # a compiled module redirects its attributes to the module inside it
    own = held.get("forward")
    held["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del held["forward"]
        else:
            held["forward"] = own


def _logits(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors to which backward from ``tensor`` would add gradients."""
    nodes: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    found: dict[Tensor, None] = {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node.variable] = None
        nodes += [following for following, _ in node.next_functions]
    return list(found)


def _feeds_the_head(model: Any, decoder: nn.Module) -> bool:
    """Whether the model's logits are those that its head makes of the decoder's hidden states, in two parts."""
    base = base_model(model)
    device = next(base.parameters()).device
    inputs = {"input_ids": torch.arange(1, 8, device=device).unsqueeze(0), "use_cache": False}

    def in_two_parts(hidden: Tensor, head: Head) -> Tensor:
        with head.stand_ins():
            return torch.cat([head(part).detach() for part in (hidden[0, :3], hidden[0, 3:])])

    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.no_grad():
            whole = _logits(model(**inputs))[0]
        try:
            return _alike(_with_head(model, decoder, in_two_parts, inputs), whole)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # the decoder's result has another form, or the head needs more than it
    finally:
        for module, mode in modes.items():
            module.training = mode


def _alike(logits: Tensor, others: Tensor) -> bool:
    if logits.shape != others.shape or logits.dtype != others.dtype:
        return False
    if logits.is_meta:
        return True
    difference, largest = (logits - others).abs().max(), others.abs().max()
    return bool(difference <= TOLERANCES.get(logits.dtype, LOW_PRECISION_TOLERANCE) * largest)
