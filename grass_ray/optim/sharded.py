"""Parameters that FSDP2 has sharded: each worker updates its own rows, and holds states for them alone.

``torch.distributed.fsdp.fully_shard`` makes every parameter a ``DTensor`` of which a worker has a block of rows. It
gathers a layer's weights for its forward and its backward, and reduces and scatters the gradients of what trains; what
is frozen is never reduced. So a layer-wise optimizer needs only the local blocks, norms over all workers, and
hooks on the gathered weights, whose gradients are the worker's own until they are reduced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grass_ray.optim.hooks import WeakHook

WRAP = "for layer in model.model.layers: fully_shard(layer); fully_shard(model)"


def local(tensor: Tensor) -> Tensor:
    """This worker's rows of a sharded tensor, in the same memory; any other tensor as it is."""
    # only DTensor has to_local; importing its class takes a second that users of one GPU need not wait for
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()
    return rows


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, on its device; any other tensor as it is. Collective: call on every rank."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.full_tensor()
    return rows


def first_element(parameter: Tensor) -> int:
    """Where this worker's elements begin in the flattened parameter; 0 if it is not sharded."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or not parameter.numel():
        return 0
    rows = parameter.shape[0]
    first: int = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return first * (parameter.numel() // rows)


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Put a whole tensor into a parameter, or this worker's rows of it into a sharded one."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        value = _rows(value, mesh.get_local_rank(), mesh.size())
    local(parameter).copy_(value)


def reshard(model: nn.Module) -> None:
    """Bring the weights that a forward without a backward has left gathered back to their shards."""
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()  # type: ignore[operator]


@dataclass(frozen=True)
class Saved:
    """Whose rows a saved state has."""

    rank: int
    count: int

    def to_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)


class Shards:
    """How a model's parameters lie over the workers. Make it with :func:`find_shards`.

    Args:
        roots: the outermost modules given to ``fully_shard``.
        mesh: the workers, a ``DeviceMesh`` of one dimension.

    Attributes:
        group: the workers' process group.
        saved: this worker's place among them.
    """

    def __init__(self, roots: Sequence[nn.Module], mesh: Any) -> None:
        self._roots = roots
        self.group = mesh.get_group()
        self.saved = Saved(dist.get_rank(self.group), dist.get_world_size(self.group))
        for root in roots:
            # FSDP2 decides at the first forward in which precision it reduces, by what trains then; a layer frozen at
            # that moment would get gradients of another dtype when it thaws
            root._get_fsdp_state()._lazy_init()  # type: ignore[operator]

    def of_all(self, group: Any | None) -> Any:
        """The workers' group. Raises ValueError where ``group`` is another one."""
        ranks = dist.get_process_group_ranks(self.group)
        if group is not None and dist.get_process_group_ranks(group) != ranks:
            raise ValueError(
                f"process_group has the workers {dist.get_process_group_ranks(group)}, but the model is sharded over "
                f"{ranks}; leave process_group out"
            )
        return self.group

    # -------------------------------------------------------------------------------------------------- what is reduced

    def norms(self, groups: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
        """The norm of each group of sharded gradients, float32 of shape (groups,), by one reduction for all."""
        squares = torch.zeros(len(groups), dtype=torch.float32, device=device)
        for index, gradients in enumerate(groups):
            own = [rows for gradient in gradients if (rows := local(gradient)).numel()]
            if own:
                parts = [torch.linalg.vector_norm(rows, dtype=torch.float32) for rows in own]
                squares[index] = torch.stack(parts).square().sum()
        if self.saved.count > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt_()

    def finish(self, parameters: Sequence[nn.Parameter], *, summed: bool) -> None:
        """Turn the mean over the workers, which FSDP2 leaves in the gradients, into their sum if that is wanted."""
        if summed and self.saved.count > 1:
            own = [local(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_mul_(own, self.saved.count)

    def gather(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """All workers' rows as one tensor of ``shape`` on the device of ``rows``. Collective: call on every rank."""
        if self.saved.count == 1:
            return rows.reshape(shape)
        # as bytes, since not every backend has every dtype; every block but the last ones has the same number of rows
        each = -(-shape[0] // self.saved.count)
        row_bytes = rows.element_size() * int(torch.Size(shape[1:]).numel())
        block = torch.zeros(each * row_bytes, dtype=torch.uint8, device=rows.device)
        own = rows.contiguous().view(-1).view(torch.uint8)
        block[: own.numel()].copy_(own)
        blocks = block.new_empty(self.saved.count * block.numel())
        dist.all_gather_into_tensor(blocks, block, group=self.group)
        return blocks[: shape[0] * row_bytes].view(rows.dtype).view(*shape)

    def own_rows(self, whole: Tensor) -> Tensor:
        """This worker's rows of a whole tensor."""
        return _rows(whole, self.saved.rank, self.saved.count)

    # ------------------------------------------------------------------------------------------------------- hooks

    def before_forward(self, wait: WeakHook) -> list[Any]:
        """Call ``wait`` before a forward gathers any weight: FSDP2 gathers on a stream that waits here alone.

        Returns:
            Handles that take the hooks away.
        """
        return [root.register_forward_pre_hook(wait, prepend=True) for root in self._roots]

    def watch(
        self, parameters: Sequence[nn.Parameter], hook: weakref.WeakMethod[Callable[[nn.Parameter, nn.Parameter], None]]
    ) -> list[Any]:
        """Call ``hook(sharded, gathered)`` once for every parameter, when it is first gathered while it trains.

        ``gathered`` is the parameter that autograd sees. FSDP2 gives its storage back and takes it again, and keeps the
        object, so hooks on it stay.

        Returns:
            Handles that take the hooks away.
        """
        handles = []
        wanted = set(parameters)
        for root in self._roots:
            for module in root.modules():
                if _is_fsdp(module):
                    places = [place for place in _own_places(module) if place[2] in wanted]
                    handles.append(module.register_forward_pre_hook(_Watcher(places, hook)))
        return handles


class _Watcher:
    """A forward pre-hook of a sharded module that finds its gathered parameters."""

    def __init__(
        self,
        places: list[tuple[nn.Module, str, nn.Parameter]],
        hook: weakref.WeakMethod[Callable[[nn.Parameter, nn.Parameter], None]],
    ) -> None:
        self._places = places
        self._hook = hook
        self._seen: dict[nn.Parameter, nn.Parameter] = {}

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for owner, name, sharded in self._places:
            gathered = getattr(owner, name)
            if gathered.requires_grad and gathered is not sharded and self._seen.get(sharded) is not gathered:
                self._seen[sharded] = gathered
                if (hook := self._hook()) is not None:
                    hook(sharded, gathered)


def find_shards(model: nn.Module) -> Shards | None:
    """How FSDP2 has sharded ``model``; None if it has not. Brings gathered weights back to their shards first.

    Raises:
        ValueError: the model is sharded in a way that cannot train layer-wise: over a mesh of two dimensions (hybrid
            sharding, tensor parallelism), not by rows, or over more than one mesh.
    """
    modules = {name: module for name, module in model.named_modules() if _is_fsdp(module)}
    if not modules:
        return None
    reshard(model)
    sharded = {name: p for name, p in model.named_parameters() if hasattr(p, "placements")}
    layouts = {(parameter.device_mesh, tuple(parameter.placements)): name for name, parameter in sharded.items()}  # type: ignore[attr-defined]
    for (mesh, placements), name in layouts.items():
        if mesh.ndim != 1 or len(layouts) != 1 or not placements[0].is_shard(0):
            raise ValueError(
                f"{name} lies as {placements} over a mesh of shape {tuple(mesh.shape)}, one of {len(layouts)} layouts; "
                "layer-wise training works with FSDP2 over one mesh of one dimension, sharded by rows (no hybrid "
                f"sharding, no tensor parallelism): {WRAP}"
            )
    roots = [
        module
        for name, module in modules.items()
        if not any(name != outer and (not outer or name.startswith(outer + ".")) for outer in modules)
    ]
    return Shards(roots, next(iter(layouts))[0])


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale gradients, sharded or not, to ``max_norm`` where their global ``norm`` is larger, as torch does."""
    if not any(hasattr(p, "to_local") for p in parameters):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    own = [local(p.grad) for p in parameters if p.grad is not None]
    if own:
        torch._foreach_mul_(own, coefficient)


def check_sharded(names: dict[nn.Parameter, str], managed: Sequence[nn.Parameter]) -> None:
    """Make sure that everything that trains is sharded.

    Raises:
        ValueError: some of it is not, so that every worker would train its own.
    """
    whole = [names[p] for p in managed if not hasattr(p, "placements")]
    if whole:
        raise ValueError(
            f"{len(whole)} parameters that train are not sharded ({', '.join(whole[:3])}), while others are; give the "
            f"whole model to fully_shard: {WRAP}"
        )


def _rows(whole: Tensor, rank: int, count: int) -> Tensor:
    """A worker's block of rows: all blocks have as many, but the last ones that have any."""
    each = -(-whole.shape[0] // count)
    start = min(rank * each, whole.shape[0])
    return whole[start : min(start + each, whole.shape[0])]


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _own_places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Where the parameters of a sharded module are, those of sharded modules inside it left out."""
    yield from ((module, name, p) for name, p in module.named_parameters(recurse=False, remove_duplicate=False))
    for child in module.children():
        if not _is_fsdp(child):
            yield from _own_places(child)
