"""Triton kernels of the steps round the matmuls, written once for both frontends.

A kernel is launched from a `plan.Launch`: data that says which kernel, how many programs and what shapes its code.
Everything that shapes the code is constexpr; row counts are plain numbers that no code is specialised for, so another
number of tokens never compiles anything; what only the device knows (group sizes) is read from its memory. Arguments
stand in the order inputs, numbers, outputs, constexprs. An input that a launch leaves out is any pointer, never read.

The files with kernels import triton, so they are imported where they are launched; `plan` needs nothing.
"""

if __name__ != "moebius.core.kernels":
    raise ImportError(f"this folder is the package moebius.core.kernels; import it by that name, not as {__name__!r}")
