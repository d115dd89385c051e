"""A fine-tuning method: which parameters train, and how."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from grass_ray.config.adapters import AnyAdapterConfig
from grass_ray.config.base import BuildablePart, ConfigPart, Decay, NonNegativeFloat, PositiveFloat, PositiveInt
from grass_ray.config.imported import ImportedPart
from grass_ray.config.samplers import AllLayersConfig, AnySamplerConfig

Offload = Literal["none", "resident", "blocking", "overlap", "lazy", "auto"]
Weights = Literal["resident", "streamed"]
# import path of each mode's class; "auto" chooses among them
PLACEMENTS = {
    "none": "grass_ray.optim.placement.OnDevice",
    "resident": "grass_ray.optim.placement.Resident",
    "blocking": "grass_ray.optim.streamed.Blocking",
    "overlap": "grass_ray.optim.streamed.Overlap",
    "lazy": "grass_ray.optim.streamed.Lazy",
}


class ProjectionConfig(BuildablePart):
    """Base class of update rules in place of AdamW: low-rank projections, and rules with one moment."""

    kind: str

    def build(self) -> Any:
        """Build the :class:`~grass_ray.optim.projection.Projection`."""
        return self.make()


class GaLoreConfig(ProjectionConfig):
    """GaLore (arXiv 2403.03507): keeps the moments of each matrix along the top singular directions of its gradient."""

    builds: ClassVar[str] = "grass_ray.optim.projection.GaLore"
    kind: Literal["galore"] = "galore"
    rank: PositiveInt = 128
    """Number of singular directions (r), at most the shorter side of the matrix."""
    refresh_period: PositiveInt = 200
    """Number of optimizer steps between new projections (T)."""
    scale: PositiveFloat = 0.25
    """Factor of the projected update (alpha)."""


class ApolloConfig(ProjectionConfig):
    """APOLLO (arXiv 2412.05270): scales gradients as Adam would scale them in a random low-rank space."""

    builds: ClassVar[str] = "grass_ray.optim.projection.Apollo"
    kind: Literal["apollo"] = "apollo"
    rank: PositiveInt = 256
    """Dimension of the random projection (r), at most the shorter side of the matrix."""
    refresh_period: PositiveInt = 200
    """Number of optimizer steps between new projections (T)."""
    scale: PositiveFloat = 1.0
    """Scale of the update, which is multiplied by its square root (alpha)."""
    scaling: Literal["channel", "tensor"] = "channel"
    """Whether each channel of a matrix or the whole matrix (APOLLO-Mini) has a scaling factor."""


class SGDConfig(ProjectionConfig):
    """SGD with momentum, of every parameter that trains. A learning rate of AdamW is too small for it."""

    builds: ClassVar[str] = "grass_ray.optim.momentum.SGD"
    kind: Literal["sgd"] = "sgd"
    momentum: Decay = 0.9
    """Weight of the old moment."""
    nesterov: bool = False
    """Whether to look ahead along the moment."""


class MuonConfig(ProjectionConfig):
    """Muon, of the layers' weight matrices: makes each moment orthogonal. AdamW trains all else."""

    builds: ClassVar[str] = "grass_ray.optim.momentum.Muon"
    kind: Literal["muon"] = "muon"
    momentum: Decay = 0.95
    """Weight of the old moment."""
    nesterov: bool = True
    """Whether to look ahead along the moment."""
    newton_schulz_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Number of Newton-Schulz steps that make the moment orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the learning rate is scaled for the shape of a matrix: so that one of AdamW fits (arXiv 2502.16982), or as
    originally, by the root of rows over columns if that is above 1."""


class ImportedProjectionConfig(ProjectionConfig, ImportedPart):
    """An update rule of your own for the layers' weight matrices, from a method file."""

    base: ClassVar[str] = "grass_ray.optim.projection.Projection"
    needs: ClassVar[tuple[str, ...]] = ("start", "update")
    kind: Literal["import"] = "import"

    def build(self) -> Any:
        """Build the projection."""
        return self.build_with(0)


AnyProjectionConfig = Annotated[
    GaLoreConfig | ApolloConfig | SGDConfig | MuonConfig | ImportedProjectionConfig, Field(discriminator="kind")
]


class InactiveSGDConfig(BuildablePart):
    """Small steps of SGD on layers that are not active, made in the backward pass (BREAD)."""

    builds: ClassVar[str] = "grass_ray.optim.inactive.InactiveSGD"
    lr_scale: PositiveFloat = 1.0
    """Their learning rate, as a multiple of that of the active layers."""
    sign: bool = False
    """Whether to step along the signs of the gradient."""
    layers: Literal["all", "above"] = "all"
    """``all`` inactive layers, or those ``above`` the lowest active one, which the backward pass reaches anyway."""


class OptimizerConfig(ConfigPart):
    """AdamW and gradient clipping."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: PositiveFloat = 1e-8
    """Term added to the denominator for numerical stability."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay. Not applied to biases and norms."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Maximum norm of the gradients of all parameters that train. ``null`` does not clip."""
    projection: AnyProjectionConfig | None = None
    """Update rule in place of AdamW: a low-rank projection of the moments of the layers' weight matrices, ``muon`` for
    these matrices, or ``sgd`` for all that trains."""
    precision: Literal["weights", "rem16", "exact", "int8"] = "rem16"
    """State kept for bfloat16 weights: ``weights`` keeps moments in bfloat16; ``rem16`` also keeps the 16 bits that
    make the weight a float32 number; ``exact`` keeps these and float32 moments; ``int8`` keeps these and moments in 8
    bits. On other weights only ``int8`` has an effect: the moments of float32 matrices are kept in 8 bits."""


class MethodConfig(ConfigPart):
    """A fine-tuning method: adapter, sampler, optimizer, and what happens to the states of inactive layers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the method in tables and records."""
    adapter: AnyAdapterConfig | None = None
    """Adapter that is trained in place of the model's own weights."""
    sampler: AnySamplerConfig = AllLayersConfig()
    """Which layers train at which step."""
    granularity: Literal["layer", "block", "matrix"] = "layer"
    """Units that the sampler selects: decoder layers (``layer``); decoder layers, embeddings, and head with final norm
    (``block``); or weight matrices (``matrix``)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    offload: Offload = "none"
    """Where optimizer states are kept: on the device (``none``); on the device for active layers and on the host for
    others (``resident``); on the host, streamed to the device at each step (``blocking``, ``overlap``, ``lazy``).
    ``auto`` selects ``resident`` if that fits into memory, else ``lazy``. All modes give identical weights."""
    weights: Weights = "resident"
    """Where the weights of decoder layers are kept: on the device (``resident``); or on the host for layers that do not
    train, from where they pass through the device ahead of each forward and backward pass (``streamed``). Both give
    identical weights."""
    inactive_states: Literal["keep", "reset"] = "keep"
    """Whether to keep or reset the optimizer states of a layer that becomes inactive."""
    inactive_updates: InactiveSGDConfig | None = None
    """Small updates of the layers that are not active. Needs one worker, ``inactive_states: reset`` and resident
    weights."""
    update_in_backward: bool = False
    """Whether to update each layer inside the backward pass and free its gradients, so that those of all layers are
    never held. Needs one worker and ``optimizer.max_grad_norm: null``, since clipping has to see all gradients first.
    The weights become the same."""
    train_embeddings: bool = False
    """Whether to train the embeddings (and a head tied to them) at every step."""
    train_head: bool = False
    """Whether to train the language modeling head at every step, unless it is tied to the embeddings."""
    train_norm: bool = False
    """Whether to train the final norm at every step."""

    @property
    def can_stream_weights(self) -> bool:
        """Whether there are decoder layers whose weights do not train at every step."""
        return self.inactive_updates is None and (self.adapter is not None or not self.sampler.trains_all)

    @property
    def imported_parts(self) -> list[ImportedPart]:
        """The parts that are code of the user's own."""
        return [part for part in (self.sampler, self.optimizer.projection) if isinstance(part, ImportedPart)]

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if mismatch := self.sampler.mismatch(self.adapter, self.granularity):
            raise ValueError(mismatch)
        if self.optimizer.projection is not None and self.offload in ("blocking", "overlap", "lazy"):
            raise ValueError(
                f"offload {self.offload}: the states of projection {self.optimizer.projection.kind} are not streamed; "
                "use none or resident"
            )
        if self.inactive_updates is not None and (self.inactive_states == "keep" or self.sampler.trains_all):
            raise ValueError(
                "inactive_updates: they are for layers that a sampler leaves out, whose states begin anew; set "
                "method.inactive_states=reset, and a sampler that draws"
            )
        if self.weights == "streamed" and self.inactive_updates is not None:
            raise ValueError("weights streamed: inactive_updates change weights of layers that would be on the host")
        if self.weights == "streamed" and not self.can_stream_weights:
            raise ValueError("weights streamed: every layer trains at every step, so none can be kept on the host")
        if self.update_in_backward and self.optimizer.max_grad_norm is not None:
            raise ValueError(
                f"update_in_backward: clipping (optimizer.max_grad_norm {self.optimizer.max_grad_norm:g}) has to see "
                "all gradients first; set method.optimizer.max_grad_norm=null"
            )
        if self.granularity == "block" and (self.train_embeddings or self.train_head or self.train_norm):
            raise ValueError("granularity block samples embeddings, head and norm; the train_* flags must be false")
        if self.adapter is not None and self.adapter.virtual_tokens and not self.sampler.trains_all:
            raise ValueError(f"{self.adapter.kind} tuning trains nothing inside the layers; its sampler must be all")
        return self
