"""Builds personmae_kernels._C, the optional C++/CUDA operators. All else about the package stands in pyproject.toml.

Prints one line: built, or skipped and why. It never fails the install: what is missing is done in plain torch and numpy instead.
One binary serves several versions of torch (stable ABI, from 2.10) and Python (limited API, from 3.11).

    python setup.py build_ext --inplace      builds it beside the sources; `make install` does this
    PERSONMAE_NO_EXTENSION=1                 leaves it out
    PERSONMAE_NO_CUDA=1                      leaves its CUDA part out
    PERSONMAE_NVCC=/path/to/nvcc             the CUDA compiler to use (default: the nvcc on the path)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

NAME = "personmae_kernels._C"
TORCH_TARGET = "0x020a000000000000"  # 2.10: the oldest torch that may load the binary
PYTHON_TARGET = "0x030b0000"  # 3.11
CUDA_ARCHITECTURES = ("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90")


class Skipped(Exception):
    """Why the extension, or its CUDA part, is left out."""


def torch_folder() -> Path:
    """The folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Skipped("torch is not installed where the build runs (with pip: install torch first, then --no-build-isolation)")
    version = importlib.metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (2, 10):
        raise Skipped(f"torch {version} is older than 2.10")
    return Path(spec.origin).parent


def compile_cuda(build_folder: Path) -> tuple[list[str], list[str]]:
    """Compiles csrc/*.cu, which include no torch header, with nvcc. Returns (objects, linker flags)."""
    sources = sorted(Path("csrc").glob("*.cu"))
    if not sources:
        raise Skipped("no CUDA sources")
    if os.environ.get("PERSONMAE_NO_CUDA") == "1":
        raise Skipped("PERSONMAE_NO_CUDA=1")
    nvcc = os.environ.get("PERSONMAE_NVCC") or shutil.which("nvcc")
    if not nvcc:
        raise Skipped("no nvcc on the path")
    build_folder.mkdir(parents=True, exist_ok=True)
    architectures = [f"-gencode=arch={architecture}" for architecture in CUDA_ARCHITECTURES]
    objects = []
    try:
        for source in sources:
            target = build_folder / f"{source.stem}.cu.o"
            options = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            subprocess.run([nvcc, "-c", str(source), "-o", str(target), *options, *architectures], check=True)
            objects.append(str(target))
        # The toolkit's own library folders: nvcc on the path may be a wrapper that lies elsewhere.
        plan = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    except subprocess.CalledProcessError as error:
        raise Skipped(f"{nvcc} failed, its messages stand above") from error
    except OSError as error:
        raise Skipped(f"{nvcc} does not start: {error}") from error
    folders = re.findall(r'"-L([^"]+)"', plan)
    if not any((Path(folder) / "libcudart_static.a").exists() for folder in folders):
        raise Skipped(f"no libcudart_static.a in the library folders of {nvcc}")
    libraries = [f"-L{folder}" for folder in folders]
    # Linked statically, so that the binary needs no libcudart of one version and also loads on a machine without CUDA.
    return objects, [*libraries, "-l:libcudart_static.a", "-lrt", "-lpthread", "-ldl"]


class OptionalExtension(build_ext):
    """Builds the extension where that is possible, and says in one line what came of it."""

    def build_extension(self, ext: Extension) -> None:
        """Adds what only the build machine knows (torch's folders, nvcc's objects) and compiles."""
        # Always anew: the dates of the sources say nothing of whether nvcc was there, or of the version of torch.
        self.force = True
        try:
            cuda = self.configure(ext)
            super().build_extension(ext)
        except Skipped as reason:
            self.leave_out(ext, str(reason))
        except (BaseError, CCompilerError, OSError) as error:
            self.leave_out(ext, f"no working C++ compiler or Python headers (Debian: g++ python3-dev): {error}")
        else:
            print(f"{NAME}: built, {cuda}")

    def leave_out(self, ext: Extension, reason: str) -> None:
        """Says why, and removes the binary of an earlier build: an old operator under new Python code would be worse than none."""
        for stale in (Path(self.get_ext_fullpath(ext.name)), *Path("kernels/personmae_kernels").glob("_C.*.so")):
            stale.unlink(missing_ok=True)
        print(f"{NAME}: skipped: {reason}")

    def configure(self, ext: Extension) -> str:
        """Fills in `ext`. Returns what to say of the CUDA part."""
        if os.environ.get("PERSONMAE_NO_EXTENSION") == "1":
            raise Skipped("PERSONMAE_NO_EXTENSION=1")
        torch = torch_folder()
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        try:
            objects, flags = compile_cuda(Path(self.build_temp))
        except Skipped as reason:
            return f"without CUDA operators ({reason})"
        ext.extra_objects += objects
        ext.extra_link_args += flags
        ext.define_macros += [("PERSONMAE_CUDA", None), ("USE_CUDA", None)]
        return "with CUDA operators"


extension = Extension(
    NAME,
    sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
    depends=sorted(str(path) for pattern in ("*.h", "*.cu") for path in Path("csrc").glob(pattern)),
    include_dirs=["csrc"],
    libraries=["torch_cpu", "c10"],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)],
    # Sums are equal to the bit on every processor: a product and a sum are rounded each (GCC fuses them where it may, on ARM for one).
    extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off"],
    language="c++",
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": OptionalExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
