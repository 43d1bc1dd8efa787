"""What NVIDIA's data sheets say of the GPUs that kernels are made for; reports and heuristics judge by it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its data sheet and cudaGetDeviceProperties describe it.

    device_kind: the driver's name. capability: compute capability. bandwidth: of its memory, bytes/s. matrix: dense bfloat16 FLOP/s of
    the tensor cores. float32: FLOP/s without them. processors: streaming multiprocessors. shared: bytes of shared memory that a block
    may ask for. memory: bytes. l2: bytes. lowered_as: the driver's name of a card of its generation by which jax lowers for it where it is
    not here, if jax does not know its own.
    """

    device_kind: str
    capability: tuple[int, int]
    bandwidth: float
    matrix: float
    float32: float
    processors: int
    shared: int
    memory: int
    l2: int
    lowered_as: str | None = None


GPUS = {
    "a100": Gpu(
        device_kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        bandwidth=2.039e12,
        matrix=312e12,
        float32=19.5e12,
        processors=108,
        shared=166912,
        memory=85100068864,
        l2=41943040,
    ),
    "h100": Gpu(
        device_kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        bandwidth=3.352e12,
        matrix=989e12,
        float32=66.9e12,
        processors=132,
        shared=232448,
        memory=84942979072,
        l2=52428800,
    ),
    "b200": Gpu(
        device_kind="NVIDIA B200",
        capability=(10, 0),
        bandwidth=7.672e12,
        matrix=2250e12,
        float32=74.4e12,
        processors=148,
        shared=232448,
        memory=191514411008,
        l2=132644864,
    ),
}

# of generations that the kernels are made for, but not checked for at every change
OTHERS = {
    "a10": Gpu(
        device_kind="NVIDIA A10",
        capability=(8, 6),
        bandwidth=6.0e11,
        matrix=125e12,
        float32=31.2e12,
        processors=72,
        shared=101376,
        memory=24146608128,
        l2=6291456,
    ),
    "l40s": Gpu(
        device_kind="NVIDIA L40S",
        capability=(8, 9),
        bandwidth=8.64e11,
        matrix=362e12,
        float32=91.6e12,
        processors=142,
        shared=101376,
        memory=47810936832,
        l2=100663296,
        lowered_as="NVIDIA L40",
    ),
    "h200": dataclasses.replace(  # the same chip, with other memory
        GPUS["h100"], device_kind="NVIDIA H200", bandwidth=4.8e12, memory=150754820096
    ),
}
KNOWN = GPUS | OTHERS

# names within a device kind, the longer of two that begin alike first
_CAPABILITIES = {
    "GB300": (10, 3),
    "B300": (10, 3),
    "GB200": (10, 0),
    "B200": (10, 0),
    "GH200": (9, 0),
    "H200": (9, 0),
    "H100": (9, 0),
    "H800": (9, 0),
    "A100": (8, 0),
    "A800": (8, 0),
    "A30": (8, 0),
    "A10": (8, 6),
    "A40": (8, 6),
    "RTX 30": (8, 6),
    "RTX A": (8, 6),
    "L40": (8, 9),
    "L4": (8, 9),
    "RTX 40": (8, 9),
    "RTX 50": (12, 0),
    "RTX PRO": (12, 0),
    "GB10": (12, 1),
    "T4": (7, 5),
    "V100": (7, 0),
    "P100": (6, 0),
}


def capability(device_kind: str) -> tuple[int, int] | None:
    """The compute capability of a GPU by its driver's name, None for one that is not listed."""
    return next((value for name, value in _CAPABILITIES.items() if name in device_kind), None)


def describe(device_kind: str) -> Gpu:
    """What heuristics judge a GPU by: its own data sheet, else that of one of its generation, else the one with least shared memory."""
    known = sorted(KNOWN.values(), key=lambda gpu: gpu.shared)
    own = [gpu for gpu in known if gpu.device_kind == device_kind]
    alike = [gpu for gpu in GPUS.values() if gpu.capability == capability(device_kind)]
    alike += [gpu for gpu in known if gpu.capability == capability(device_kind)]
    return (own + alike + known)[0]
