"""Which weight is quantised how, and what that takes."""

from jaxinfer.quantization.policy import attending, stored_as
from jaxinfer.quantization.report import MemoryReport, TensorBytes, memory_report

__all__ = ["MemoryReport", "TensorBytes", "attending", "memory_report", "stored_as"]
