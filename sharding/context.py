"""ParallelContext: how a block reaches its collectives. Without one they are identities, so that a module is an ordinary one."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from sharding import collectives
from sharding.mesh import check_mesh
from sharding.rules import EXPERT, ROW_AXES, STAGE, TENSOR_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Names of the mesh axes that are larger than 1, as seen inside shard_map. An axis of size 1 emits no collective.

    tensor: axes that split heads and mlp. stage: the pipeline axis or None. stages: its size. rows: axes that split the batch. expert: the
    one of them that splits experts too, or None. int8_hosts: partial sums cross hosts as INT8 (`collectives.sum_int8`), where tensor
    shards lie on several. split_tokens: rows of many tokens are split over tensor shards between half layers. direct: see
    `collectives.sends_directly`.
    """

    tensor: tuple[str, ...] = ()
    stage: str | None = None
    stages: int = 1
    rows: tuple[str, ...] = ()
    expert: str | None = None
    int8_hosts: bool = False
    split_tokens: bool = False
    direct: bool = False

    @classmethod
    def from_mesh(cls, mesh: Mesh) -> "ParallelContext":
        check_mesh(mesh)
        large = {name for name, size in mesh.shape.items() if size > 1}
        return cls(
            tensor=tuple(a for a in TENSOR_AXES if a in large),
            stage=STAGE if STAGE in large else None,
            stages=mesh.shape[STAGE],
            rows=tuple(a for a in ROW_AXES if a in large),
            expert=EXPERT if EXPERT in large else None,
            direct=mesh.size > 1 and collectives.sends_directly(mesh),
        )

    # --- tensor parallelism
    def enter(self, x):
        """`x` into a tensor-parallel region (a gradient rule only)."""
        return collectives.enter(x, self.tensor) if self.tensor and x is not None else x

    def leave(self, x):
        """The sum of partial results over the tensor shards; in layers where they lie on several hosts."""
        if len(self.tensor) > 1:
            hosts, local = self.tensor
            return collectives.leave_hosts(x, hosts, local, self.int8_hosts, self.direct)
        return collectives.leave(x, self.tensor) if self.tensor else x

    @property
    def lead(self):
        """Whether this shard adds what is replicated to a partial sum, bool scalar, as tensor rank 0 does; None: there is no other. What it
        adds has been through `enter`, else its gradient would live on that rank alone."""
        return lax.axis_index(self.tensor) == 0 if self.tensor else None

    def same_rows(self, x, replicas: int, first: int):
        """`x`, whose rows from `first` on are the same on `replicas` neighbouring tensor shards (a gradient rule only)."""
        return collectives.same_rows(x, self.tensor, replicas, first)

    def frozen_columns(self, x, real):
        """`x` [rows, columns], of whose columns on this tensor shard only those are trained that are `real`, a table bool [shards, columns]
        (a gradient rule only)."""
        return collectives.frozen_zeros(x, jnp.asarray(real)[lax.axis_index(self.tensor)])

    def max_over_tensor(self, x):
        """Largest value over the tensor shards: scales of activations that are split."""
        return lax.pmax(x, self.tensor) if self.tensor else x

    # --- tokens, split over tensor shards between half layers where `split_tokens` says so
    @property
    def _tokens(self) -> tuple[str, ...]:
        """The tensor axes, the one inside a host first: only shares of a host cross to others."""
        return self.tensor[::-1]

    def _divisible(self, x):
        """`x` [B, T, ...] with zeros behind it, so that the shards divide its tokens."""
        pad = -x.shape[1] % lax.axis_size(self.tensor)
        return jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))

    def own_tokens(self, x):
        """This shard's tokens of `x` [B, T, ...], which is whole on all; shards have as many each, zeros behind the last."""
        return collectives.own_tokens(self._divisible(x), self._tokens)

    def scatter_tokens(self, x):
        """This shard's tokens of the sum of partial results [B, T, ...] over the tensor shards."""
        return collectives.scatter_tokens(self._divisible(x), self._tokens, self.direct)

    def gather_tokens(self, x, tokens: int):
        """The `tokens` tokens of all shards into a tensor-parallel region."""
        return collectives.gather_tokens(x, self._tokens, self.direct)[:, :tokens]

    def join_tokens(self, x, tokens: int):
        """The `tokens` tokens of all shards, whole on all."""
        return collectives.join_tokens(x, self._tokens)[:, :tokens]

    # --- rows
    def max_over_rows(self, x):
        """Largest value over the shards of the batch."""
        return lax.pmax(x, self.rows) if self.rows else x

    # --- experts
    def to_experts(self, x, sizes, *, capacity: int, ragged: bool) -> collectives.Arrived:
        """Rows to the shards that hold their experts, see `collectives.dispatch`."""
        assert self.expert is not None
        return collectives.dispatch(x, sizes, self.expert, capacity=capacity, ragged=ragged)

    def from_experts(self, y, arrived: collectives.Arrived, *, rows: int, ragged: bool):
        """What came of them back to where they are from, see `collectives.collect`."""
        assert self.expert is not None
        return collectives.collect(y, arrived, self.expert, rows=rows, ragged=ragged)

    # --- the vocabulary, split over stages and tensor shards
    @property
    def vocab(self) -> tuple[str, ...]:
        return ((self.stage,) if self.stage else ()) + self.tensor

    def vocab_index(self):
        """Which shard of the vocabulary this device holds, int32 scalar."""
        return lax.axis_index(self.vocab) if self.vocab else jnp.int32(0)

    def enter_vocab(self, x):
        return collectives.enter(x, self.vocab) if self.vocab else x

    def leave_vocab(self, x):
        return collectives.leave(x, self.vocab) if self.vocab else x

    def gather_vocab(self, x):
        """Join shards of the vocabulary along the last axis."""
        return collectives.gather_shards(x, self.vocab, x.ndim - 1) if self.vocab else x

    def max_over_vocab(self, x):
        return lax.pmax(x, self.vocab) if self.vocab else x

    def min_over_vocab(self, x):
        return lax.pmin(x, self.vocab) if self.vocab else x

    # --- the pipeline
    def stage_index(self):
        """This device's stage, int32 scalar."""
        return lax.axis_index(self.stage) if self.stage else jnp.int32(0)

    def enter_stages(self, x):
        """A replicated `x` that not every stage uses (a gradient rule only)."""
        return collectives.enter(x, (self.stage,)) if self.stage else x

    def next_stage(self, x):
        return collectives.next_stage(x, self.stage) if self.stage else x

    def from_last_stage(self, x):
        """The last stage's `x` on every stage."""
        if not self.stage:
            return x
        return collectives.leave(jnp.where(self.stage_index() == self.stages - 1, x, 0), (self.stage,))


ALONE = ParallelContext()
