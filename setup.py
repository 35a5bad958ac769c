"""The C++ kernels. Optional: without a compiler the package installs and runs on plain torch.

Built with OpenMP but linked without its runtime: the symbols resolve to the one that torch has loaded, so that the
process holds a single pool of threads.
"""

from setuptools import Extension, setup

HEADERS = ("philox", "noise", "blocks", "bf16", "fused", "int8", "shifts")

setup(
    ext_modules=[
        Extension(
            "gradless.kernels.cpu._native",
            sources=["src/gradless/kernels/cpu/native.cpp"],
            depends=[f"src/gradless/kernels/cpu/{name}.hpp" for name in HEADERS],
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            optional=True,
        )
    ]
)
