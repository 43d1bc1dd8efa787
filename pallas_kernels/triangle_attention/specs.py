"""Matrices of pairs of real models, and an odd one."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSpec:
    """residues: sides of the matrix. heads of head_dim."""

    residues: int
    heads: int
    head_dim: int


SPECS = {
    "alphafold_2.256": PairSpec(residues=256, heads=4, head_dim=32),
    "alphafold_2.768": PairSpec(residues=768, heads=4, head_dim=32),
    "odd": PairSpec(residues=37, heads=3, head_dim=20),
}
