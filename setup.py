"""The build hook: make compiles the library, the package carries it.

Editable installs use pybmc/libpybmc.so of the checkout and native/bmc.h;
wheels get copies of both in pybmc/, and the kernels for GPUs, where make CUDA=1 has made them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.dist import Distribution

LIBRARY = "libpybmc.dylib" if sys.platform == "darwin" else "libpybmc.so"

KERNELS = "kernels.fatbin"


class BuildNative(Command):
    """Run make; outside editable mode, copy the library and its header into the package being built."""

    description = "compile the C library through make"
    user_options = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        env = {key: value for key, value in os.environ.items()
               if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        subprocess.run([env.get("MAKE", "make"), "all"], check=True, env=env)
        if not self.editable_mode:
            for source, target in self.get_output_mapping_all():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)

    def get_output_mapping_all(self):
        package = Path(self.build_lib, "pybmc")
        files = [(f"pybmc/{LIBRARY}", str(package / LIBRARY)), ("native/bmc.h", str(package / "bmc.h"))]
        return files + [(f"pybmc/{KERNELS}", str(package / KERNELS))] * Path("pybmc", KERNELS).is_file()

    def get_outputs(self):
        return [] if self.editable_mode else [target for _, target in self.get_output_mapping_all()]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return ["Makefile", *map(str, Path("native").rglob("*.[ch]")), "native/cuda/kernels.cu"]


class Build(build):
    sub_commands = [("build_native", None), *build.sub_commands]


class PlatformWheel(bdist_wheel):
    """The library is loaded with dlopen: one wheel per platform serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel},
)
