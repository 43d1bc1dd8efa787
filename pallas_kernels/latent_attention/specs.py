"""Latent attention of real models, and an odd one."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """heads: of queries. latent: elements that are keys and values. rotated: of a key that rope turns."""

    heads: int
    latent: int
    rotated: int


SPECS = {
    "deepseek_v2_lite": LatentSpec(heads=16, latent=512, rotated=64),
    "deepseek_v3": LatentSpec(heads=128, latent=512, rotated=64),
    "deepseek_v3.tensor_8": LatentSpec(heads=16, latent=512, rotated=64),
    "minicpm_3": LatentSpec(heads=40, latent=256, rotated=32),
    "odd": LatentSpec(heads=5, latent=40, rotated=12),
}
