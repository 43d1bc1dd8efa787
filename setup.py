"""The native CPU kernels as an optional extension; everything else about the package stands in pyproject.toml.

The library has no Python API: it is loaded by ctypes, and one wheel serves every Python. Where it cannot be built the package installs
without it, runs on XLA and says so; JAXINFER_REQUIRE_NATIVE=1 makes that an error.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "pallas_kernels.cpu.jaxinfer_native"


def native_build():
    """The module that compiles, without importing its package, whose dependencies are not there yet."""
    path = Path(__file__).parent / "pallas_kernels" / "cpu" / "build.py"
    spec = importlib.util.spec_from_file_location("jaxinfer_native_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles with pallas_kernels/cpu/build.py."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], native_build().LIBRARY)

    def build_extension(self, ext):
        build, target = native_build(), Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # what an earlier build has left is not this one's
        try:
            build.build(target, verbose=self.verbose > 1)
        except build.BuildError as error:
            if os.environ.get("JAXINFER_REQUIRE_NATIVE", "0") != "0":
                raise
            print(f"jaxinfer: the native CPU kernels were not built, and models will run on XLA: {error}", file=sys.stderr)

    def _built(self):
        return Path(self.build_lib, self.get_ext_filename(NAME)).is_file()

    def get_outputs(self):
        return super().get_outputs() if self._built() else []

    def get_output_mapping(self):
        return super().get_output_mapping() if self._built() else {}

    def copy_extensions_to_source(self):
        if self._built():
            super().copy_extensions_to_source()


class AnyPython(bdist_wheel):
    """A wheel for a platform, and for any platform where no library was built."""

    def get_tag(self):
        platform = super().get_tag()[2]
        library = Path(self.bdist_dir, *NAME.split(".")[:-1], native_build().LIBRARY)
        return "py3", "none", platform if library.is_file() else "any"


setup(ext_modules=[Extension(NAME, sources=[])], cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython})
