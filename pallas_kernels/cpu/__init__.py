"""Native CPU kernels behind `jax.ffi`: half layers, matmuls and the choice of the likeliest token as one call each.

The library is built when the package is installed, or with `python -m pallas_kernels.cpu.build`; without it everything runs on XLA.
JAXINFER_REQUIRE_NATIVE=1 makes a library that is missing or out of date an error.

Tracing an operation registers the calls with XLA. A program that is not traced in this process, exported or a stored executable, needs
`library.load()` before it is loaded. Exporting one needs `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]` for each
of `library.CALLS`; one for several platforms should choose by `jax.lax.platform_dependent`.
"""
