"""moebius: mixture-of-experts layers for PyTorch and for Flax, from one core.

This folder holds the version and one link to each real folder at the root of the repository, so that `core`,
`torch_frontend`, `jax_frontend` and `compare` are installed, and imported, below one name that nobody else owns.
Importing `moebius` itself loads nothing: whoever uses one framework never pays for the other.
"""

__version__ = "0.1.0"
