"""Builds the library, which needs a C++17 compiler and the headers in jaxlib."""

from glob import glob
from pathlib import Path

import jaxlib
from setuptools import Extension, setup


INCLUDE = str(Path(jaxlib.__file__).parent / "include")

# No `-march`: the files choose their instructions, and the library those of the processor.
setup(
    ext_modules=[
        Extension(
            "mamba_eqx_native._library",
            sorted(glob("src/*.cc")),
            depends=glob("src/*.h") + glob("src/*.inc"),
            # As headers of the system, whose warnings are not shown.
            extra_compile_args=["-std=c++17", "-O3", "-isystem", INCLUDE],
            # Nothing in it is Python's, so that one build serves all versions.
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
