"""`pytest -p typed`: hold every call against the axes and kinds in the annotations.

The annotations are jaxtyping's and are imported for type checkers alone, so that the library does not need it; here
that import is made to happen. Not for tests of bad input: jaxtyping would speak before moebius does.
"""

import importlib
import pkgutil
import typing

# Everything of others first: not all of it can bear to be imported under a changed TYPE_CHECKING.
import beartype
import flax.nnx
import jax
import torch
from jaxtyping import install_import_hook

PACKAGES = ("moebius.core.reference", "moebius.torch_frontend", "moebius.jax_frontend")

with install_import_hook(list(PACKAGES), "beartype.beartype"):
    typing.TYPE_CHECKING = True
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
            importlib.import_module(module.name)
    typing.TYPE_CHECKING = False

__all__ = ["beartype", "flax", "jax", "torch"]
