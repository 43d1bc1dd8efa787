"""Which rows the kernels of norms take, each of which is held by one block."""

WIDEST = 1 << 15  # elements: what a block of 1024 threads holds in registers


def rows_refusal(shape: tuple[int, ...]) -> str | None:
    """Why there is no kernel for an input of this shape, or None."""
    if not 1 <= shape[-1] <= WIDEST:
        return f"a row of {shape[-1]} does not fit the registers of a block, at most {WIDEST} do"
    return "there is nothing to norm" if 0 in shape else None
