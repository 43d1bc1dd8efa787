"""Which weight is quantised how."""

from jaxinfer.quantization.policy import stored_as

__all__ = ["stored_as"]
