"""What Gluon spells differently from one version of Triton to the next, and the versions that the kernels are made for.

Gluon is experimental: a version that nobody has compiled the kernels with is refused, and the plain kernels run.
"""

import triton
from triton.experimental.gluon import language as gl

FIRST_VERSION, END_VERSION = (3, 6), (3, 9)


def unsupported_reason() -> str | None:
    """Return why the Gluon kernels can't be used with the installed Triton, or None."""
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, and Gluon is not interpreted; the plain kernel runs instead"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if FIRST_VERSION <= version < END_VERSION:
        return None
    first, end = (".".join(map(str, version)) for version in (FIRST_VERSION, END_VERSION))
    return f"triton is {triton.__version__}, the Gluon kernels need >={first},<{end}; the plain kernel runs instead"


# A barrier of the warps of one role. Renamed in triton 3.7.
block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
