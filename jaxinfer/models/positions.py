"""Rotary positions with every scaling in use, as cosines and sines per token.

Shapes: B rows, T tokens, R rotary dimensions. Frequencies are made in float64 numpy where they are constant; angles in float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "factors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies theta^(-2i/dim), i < dim/2, and how they are scaled to longer contexts.

    kind: default; linear (Chen et al. 2023, arXiv:2306.15595); dynamic (NTK-aware, base grows with the length); yarn (Peng et al.
    2023, arXiv:2309.00071); longrope (Ding et al. 2024, arXiv:2402.13753); llama3 (Llama 3.1); factors (one divisor a frequency).
    original_positions: the context before scaling. attention_factor: multiplies cosines and sines, and is settled by the family.
    read_again: whether an engine reads a row that grows past the original context again, so that all its keys turn as in a row of that
    length; else those in the cache stay as they are.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    read_again: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope kind {self.kind!r} is not one of {KINDS}")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary dimensions must be even and positive, got {self.dim}")
        for name in ("short_factors", "long_factors"):
            if getattr(self, name) and len(getattr(self, name)) != self.dim // 2:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, needed are {self.dim // 2}, one a frequency")

    @property
    def depends_on_length(self) -> bool:
        """True where the frequencies of a token depend on how long its row is when it is computed."""
        return self.kind in ("dynamic", "longrope")

    def base_frequencies(self) -> np.ndarray:
        return self.theta ** -(np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)

    def frequencies(self) -> np.ndarray:
        """float64 [R/2]; for the kinds that depend on the length, those of a row that is within the original context."""
        base = self.base_frequencies()
        if self.kind == "linear":
            return base / self.factor
        if self.kind == "yarn":
            return self._yarn(base)
        if self.kind == "llama3":
            return self._llama3(base)
        if self.kind in ("longrope", "factors"):
            return base / np.asarray(self.short_factors)
        return base

    def _yarn(self, base):
        def dimension(rotations):
            return self.dim * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        high += 0.001 if low == high else 0
        ramp = np.clip((np.arange(self.dim // 2) - low) / (high - low), 0, 1)
        return base / self.factor * ramp + base * (1 - ramp)

    def _llama3(self, base):
        wavelength = 2 * math.pi / base
        blend = (self.original_positions / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0, 1)
        return (1 - blend) * base / self.factor + blend * base


def rope_angles(rope: RopeConfig, positions, totals) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, R/2], of tokens at `positions` int32 [B, T].

    totals: int32 [B], the tokens of each row once these are in; only the kinds that depend on the length read it.
    """
    frequencies = jnp.asarray(rope.frequencies(), jnp.float32)
    if rope.kind == "dynamic":
        length = jnp.maximum(totals, rope.original_positions).astype(jnp.float32)
        growth = rope.factor * length / rope.original_positions - (rope.factor - 1)
        exponent = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim
        base = rope.theta * growth ** (rope.dim / (rope.dim - 2))
        frequencies = base[:, None, None] ** -exponent
    elif rope.kind == "longrope":
        long = jnp.asarray(rope.base_frequencies() / np.asarray(rope.long_factors), jnp.float32)
        frequencies = jnp.where((totals > rope.original_positions)[:, None, None], long, frequencies)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
