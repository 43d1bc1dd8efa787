"""Native CPU kernels behind `jax.ffi`: half layers, matmuls and the choice of the likeliest token as one call each.

The library is built when the package is installed, or with `python -m pallas_kernels.cpu.build`; without it everything runs on XLA.
JAXINFER_REQUIRE_NATIVE=1 makes a library that is missing or out of date an error.

Exporting a program that holds these calls needs `disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name)]` for each of
`library.CALLS`, and `library.load()` before it runs elsewhere; a program exported for several platforms should choose by
`jax.lax.platform_dependent`.
"""
