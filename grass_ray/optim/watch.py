"""Warn once of a training loop that trains nothing, or something else than the optimizer expects.

A layer that gets no gradient is frozen as far as the weights are concerned, and no number of a run shows it. Everything
here reads flags on the host; only :meth:`Watch.first_step` waits for the device, once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from grass_ray.optim.units import Unit

CAUSES = (
    "Call backward on the model this optimizer was built on, step before zero_grad, and pass use_reentrant=False where "
    "you call torch.utils.checkpoint yourself"
)


class Watch:
    """What an optimizer checks about the loop around it.

    Args:
        model: what the optimizer was built on.
        unmanaged: parameters outside the language model that require a gradient, by name.
        device: where all that trains will be; None leaves each parameter where it is.
    """

    def __init__(self, model: nn.Module, unmanaged: Sequence[str], device: torch.device | None = None) -> None:
        self._model = weakref.ref(model)
        # each parameter's own: models may lie on several devices, or keep some parts in another dtype
        self._built = {p: (device or p.device, p.dtype) for p in model.parameters()}
        self._said: set[str] = set()
        self._settled = False
        self._first = True
        if unmanaged:
            self._say(
                "unmanaged",
                f"{_listing(unmanaged)} require a gradient but are outside the language model, so LayerwiseAdamW "
                "freezes them; train them with an optimizer of their own, thawed after this one is built",
            )

    def check_active(self, units: Sequence[Unit]) -> None:
        """Make sure that what trains now can train.

        Raises:
            RuntimeError: a part of it was frozen elsewhere, or moved or cast the model.
        """
        frozen = [unit.name for unit in units if not all(p.requires_grad for p in unit.parameters)]
        if frozen:
            raise RuntimeError(
                f"{_listing(frozen)} should train now, but their parameters no longer require a gradient: the model "
                "was wrapped (peft adapters) or frozen after the optimizer was built. Wrap and freeze first, then "
                "build the optimizer"
            )
        first = next((p for unit in units for p in unit.parameters), None)
        if first is not None and (first.device, first.dtype) != self._built[first]:
            device, dtype = self._built[first]
            raise RuntimeError(
                f"the model is {first.dtype} on {first.device} now, but was {dtype} on {device} when the optimizer was "
                "built; move and cast the model first, then build the optimizer"
            )

    def new_active_set(self) -> None:
        """Note that another set of units trains from now on."""
        self._settled = False

    def check_strangers(self, active: Sequence[Unit]) -> None:
        """Once per active set: warn of parameters that collect gradients although the optimizer does not train them."""
        model = self._model()
        if self._settled or model is None:
            return
        self._settled = True
        known = {p for unit in active for p in unit.parameters}
        strangers = [name for name, p in model.named_parameters() if p.requires_grad and p not in known]
        if strangers:
            self._say(
                "strangers",
                f"{_listing(strangers)} require a gradient now, but LayerwiseAdamW does not train them: they were "
                "added or thawed after it was built. Unless another optimizer trains them, build the optimizer again",
            )

    def no_gradient_at_all(self) -> None:
        """Warn that ``step`` was called and nothing has a gradient."""
        self._say("nothing", f"step() was called, but no parameter has a gradient, so nothing was done. {CAUSES}")

    def not_in_backward(self) -> None:
        """Warn that updates should happen inside backward, and none did."""
        self._say(
            "in_backward",
            "update_in_backward is set, but backward updated nothing, so all gradients were kept until step(): set "
            "optimizer.last_micro_batch = True before the last backward of every step",
        )

    def without_gradient(self, units: Sequence[Unit]) -> None:
        """Warn of units that should have trained or been measured in this step and got no gradient."""
        names = [unit.name for unit in units if unit.parameters]
        if names:
            self._say(
                "units",
                f"{_listing(names)} got no gradient in a whole step: they do not train, and "
                f"their importance is not measured. {CAUSES}. If the model skips layers on purpose, ignore this",
            )

    def first_step(self, norm: Callable[[], float]) -> None:
        """Before the first update: warn if all gradients are zero, ``norm`` being their global norm."""
        if self._first and norm() == 0:
            self._say("zero", f"all gradients of the first step are zero, so nothing trains. {CAUSES}")
        self._first = False

    def mistakes(self, mistakes: Sequence[str]) -> None:
        """Warn that units changed while they were frozen, or did not change while they trained."""
        if mistakes:
            self._say("mistakes", f"not exactly the active units have changed: {_listing(mistakes)}")

    def _say(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, stacklevel=6)


def has_gradient(parameters: Sequence[Tensor]) -> bool:
    """Whether any of the parameters has a gradient."""
    return any(p.grad is not None for p in parameters)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
