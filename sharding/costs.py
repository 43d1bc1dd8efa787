"""What a layer costs: floating-point operations, bytes moved, bytes kept; for prefill and for a token of decode.

Counted from shapes, so that a plan needs no device. A matrix of n entries is 2 n operations a token; attention is 4 N H operations for each
pair of a query and a key that it sees. What is moved is the weights once a step, and the cache that is read. Norms, rotations and
residuals are left out: they are bytes of activations, which fusions hide. The roofline (Williams et al. 2009) turns both into seconds.

Letters: B sequences, T prompt tokens, S cached tokens, D embed, F mlp, N heads, K kv heads, H head_dim, E experts, V vocab.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """Latent attention (DeepSeek-V2, section 2.1): ranks of queries and of keys with values, sizes of a head's parts."""

    query_rank: int
    kv_rank: int
    plain: int
    rotated: int
    value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer. window: keys that a query sees, its own among them, None for all. gated: three matrices in an MLP, else two. experts: how
    many MLPs of `width` there are, of which each token uses `used`, 0 for a dense layer; shared: width of an MLP that all tokens use.
    latent: instead of keys and values of each head."""

    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    gated: bool = True
    window: int | None = None
    experts: int = 0
    used: int = 0
    shared: int = 0
    latent: Latent | None = None

    @property
    def kind(self) -> str:
        """What layers must have alike to share a slot of a pipeline: their structure, not their values."""
        return f"moe of {self.experts}" if self.experts else "dense"

    @property
    def attention_parameters(self) -> int:
        D, N, K, H = self.embed, self.heads, self.kv_heads, self.head_dim
        if self.latent is None:
            return D * H * (2 * N + 2 * K)
        a = self.latent
        queries = D * a.query_rank + a.query_rank * N * (a.plain + a.rotated)
        keys = D * (a.kv_rank + a.rotated) + a.kv_rank * N * (a.plain + a.value)
        return queries + keys + N * a.value * D

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.embed * width

    @property
    def parameters(self) -> int:
        """Of its matrices."""
        routed = self.experts * (self._mlp(self.width) + self.embed) if self.experts else self._mlp(self.width)
        return self.attention_parameters + routed + self._mlp(self.shared)

    @property
    def active_parameters(self) -> int:
        """Of those that one token uses."""
        if not self.experts:
            return self.parameters
        return (
            self.attention_parameters + self.used * self._mlp(self.width) + self.embed * self.experts + self._mlp(self.shared)
        )

    def touched_parameters(self, tokens: int) -> float:
        """Of those that a step over so many tokens reads, with experts drawn evenly: E (1 - (1 - used / E)^tokens) experts on average."""
        if not self.experts:
            return self.parameters
        touched = self.experts * (1 - (1 - self.used / self.experts) ** tokens)
        return self.parameters - (self.experts - touched) * self._mlp(self.width)

    @property
    def cached_per_token(self) -> int:
        """Numbers in the cache for one token."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rotated
        return 2 * self.kv_heads * self.head_dim

    @property
    def _pair(self) -> int:
        """Operations for one query and one key, over all heads."""
        if self.latent is not None:
            return 2 * self.heads * (self.latent.plain + self.latent.rotated + self.latent.value)
        return 4 * self.heads * self.head_dim

    def seen(self, tokens: int) -> int:
        """Keys that the last of so many tokens sees."""
        return tokens if self.window is None else min(tokens, self.window)

    def prefill(self, *, batch: int, tokens: int, item: float = 2, cache_item: float = 2) -> "Cost":
        """Of `batch` prompts of `tokens` tokens each. item, cache_item: bytes of a weight and of a number in the cache."""
        full = self.seen(tokens)
        pairs = full * (full + 1) // 2 + (tokens - full) * full
        flops = 2 * self.active_parameters * batch * tokens + self._pair * batch * pairs
        moved = self.touched_parameters(batch * tokens) * item + batch * tokens * self.cached_per_token * cache_item
        return Cost(flops=flops, moved=moved, kept=self.parameters * item)

    def decode(self, *, batch: int, context: int, item: float = 2, cache_item: float = 2) -> "Cost":
        """Of one token of `batch` sequences with `context` tokens in the cache each."""
        keys = self.seen(context)
        flops = (2 * self.active_parameters + self._pair * keys) * batch
        moved = self.touched_parameters(batch) * item + batch * keys * self.cached_per_token * cache_item
        return Cost(flops=flops, moved=moved, kept=self.parameters * item)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """flops: operations. moved: bytes to and from memory. kept: bytes of weights that lie in memory."""

    flops: float
    moved: float
    kept: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(flops=self.flops + other.flops, moved=self.moved + other.moved, kept=self.kept + other.kept)

    def seconds(self, device: "Device") -> float:
        """On the roofline of a device."""
        return max(self.flops / device.flops, self.moved / device.bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """flops: operations a second in matrix products. bandwidth: bytes a second of its memory. memory: bytes."""

    flops: float
    bandwidth: float
    memory: float


# NVIDIA's data sheet: dense bfloat16, HBM3
H100 = Device(flops=989e12, bandwidth=3.35e12, memory=80e9)


def embedding(*, batch: int, embed: int, item: float = 2) -> Cost:
    """Of looking up a token of `batch` sequences."""
    return Cost(flops=0, moved=batch * embed * item)


def head(*, batch: int, embed: int, vocab: int, item: float = 2) -> Cost:
    """Of the logits [B, V] of one token of `batch` sequences."""
    return Cost(flops=2 * batch * embed * vocab, moved=embed * vocab * item, kept=embed * vocab * item)


def total(costs: Sequence[Cost]) -> Cost:
    return sum(costs, Cost(flops=0, moved=0))
