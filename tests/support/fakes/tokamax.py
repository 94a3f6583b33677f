"""A stand-in for tokamax 0.0.17 and for the jax-triton 0.4.1 and triton that it imports: its two grouped matmuls.

They are as particular as the kernels of a Hopper GPU: what those leave unwritten is NaN, Mosaic's weight gradient
masks rows by multiplying them, Triton's rounds float32 to TF32 unless told otherwise, and Mosaic takes rows in
multiples of 8 and widths in multiples of 64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from fakes import forget

CALLS: list[dict[str, Any]] = []  # of every kernel, while it is traced
PRODUCT, TRANSPOSED, WEIGHT_GRADIENT = (
    lax.RaggedDotDimensionNumbers(((contracted[0], contracted[1]), ((), ())), (0,), group)
    for contracted, group in [(((1,), (1,)), (0,)), (((1,), (2,)), (0,)), (((0,), (0,)), ())]
)


# -------------------------------------------------------------------------------------------------------------- kernels
@dataclass(frozen=True)
class PallasMosaicRaggedDotConfig:
    """As the package's, without what only other GPUs read."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    split_k: int
    persistent: bool = True
    grid_minor_dim: int = 1
    grid_tile_width: int = 1

    def __post_init__(self) -> None:
        assert self.block_m % 8 == 0 and self.grid_minor_dim in (0, 1)


@dataclass(frozen=True, kw_only=True)
class PallasTritonRaggedDotConfig:
    """As the package's."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int


@dataclass(frozen=True)
class PallasMosaicRaggedDot:
    """As the package's on Hopper."""

    config: PallasMosaicRaggedDotConfig

    def __call__(self, lhs: Array, rhs: Array, **settings: Any) -> Array:
        """Forward only, as is called here."""
        assert isinstance(self.config, PallasMosaicRaggedDotConfig)
        dims, sizes = _recorded("Mosaic", self.config, lhs, rhs, settings)
        if lhs.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"Only bfloat16/float16 inputs are supported (got {lhs.dtype=}).")
        lefts = (lhs.shape[1], rhs.shape[-1], *rhs.shape[1:]) if dims != WEIGHT_GRADIENT else (*lhs.shape, *rhs.shape)
        for tile, length in [(8, lhs.shape[0]), *((64, length) for length in lefts)]:
            if length % tile and length > tile:
                raise ValueError(f"When no rounding mode is specified, a dimension must be a multiple of {tile}")
        assert lhs.shape[0] >= 8, "TMA tiles of 8 rows over fewer: not known to be right"
        if dims == WEIGHT_GRADIENT:
            return _weight_gradient(lhs, rhs, sizes, lambda mine, mask: mine * mask, lambda other, mask: other)
        return _product(lhs, rhs.mT if dims == TRANSPOSED else rhs, sizes)


@dataclass(frozen=True, kw_only=True)
class PallasTritonRaggedDot:
    """As the package's."""

    config: PallasTritonRaggedDotConfig

    def __call__(self, lhs: Array, rhs: Array, **settings: Any) -> Array:
        """Forward only, as is called here."""
        assert isinstance(self.config, PallasTritonRaggedDotConfig)
        dims, sizes = _recorded("Triton", self.config, lhs, rhs, settings)
        if lhs.dtype == jnp.float32 and settings["precision"] != lax.Precision.HIGHEST:
            lhs, rhs = (lax.reduce_precision(array, exponent_bits=8, mantissa_bits=10) for array in (lhs, rhs))
        if dims == WEIGHT_GRADIENT:
            masked = lambda array, mask: jnp.where(mask, array, 0)  # noqa: E731
            return _weight_gradient(lhs, rhs, sizes, masked, masked)
        return _product(lhs, rhs.mT if dims == TRANSPOSED else rhs, sizes)


def _recorded(family: str, config: Any, lhs: Array, rhs: Array, settings: dict[str, Any]) -> tuple[Any, Array]:
    allowed = {"group_sizes", "ragged_dot_dimension_numbers", "precision", "preferred_element_type"}
    assert settings.keys() <= allowed and lhs.dtype == rhs.dtype == settings["preferred_element_type"]
    dims, sizes = settings["ragged_dot_dimension_numbers"], settings["group_sizes"]
    assert dims in (PRODUCT, TRANSPOSED, WEIGHT_GRADIENT) and sizes.dtype == jnp.int32
    assert lhs.shape[0] and sizes.shape[0], "a grid of no blocks"
    CALLS.append(
        {
            "family": family,
            "config": asdict(config),
            "dims": dims,
            "shapes": (lhs.shape, rhs.shape),
            "dtype": str(lhs.dtype),
            "precision": settings["precision"],
        }
    )
    return dims, sizes


def _product(rows: Array, weight: Array, sizes: Array) -> Array:
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0], dtype=jnp.int32), side="right")
    mine = weight.astype(jnp.float32)[jnp.minimum(owner, weight.shape[0] - 1)]
    out = jnp.einsum("rd,rdf->rf", rows.astype(jnp.float32), mine, precision="highest").astype(rows.dtype)
    return _unmarked(jnp.where((owner < weight.shape[0])[:, None], out, jnp.nan))


def _weight_gradient(rows: Array, dout: Array, sizes: Array, mask_rows: Callable, mask_dout: Callable) -> Array:
    def one(span: tuple[Array, Array]) -> Array:
        row = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
        mask = (row >= span[0]) & (row < span[1])
        a, b = (array.astype(jnp.float32) for array in (mask_rows(rows, mask), mask_dout(dout, mask)))
        return jnp.einsum("rd,rf->df", a, b, precision="highest").astype(rows.dtype)

    ends = jnp.cumsum(sizes)
    return _unmarked(lax.map(one, (ends - sizes, ends)))


def _unmarked(out: Array) -> Array:
    """Inside shard_map over one device: not marked to vary over any mesh axis, as the kernels' results are not."""
    axes = tuple(jax.typeof(out).manual_axis_type.varying)
    return lax.pmax(out, axes) if axes else out


# ------------------------------------------------------------------------------------------------------------- packages
_EMPTY = (
    *("triton.backends", "triton.backends.nvidia", "triton.backends.nvidia.compiler"),
    *("tokamax._src", "tokamax._src.ops", "tokamax._src.ops.ragged_dot", "tokamax.ops"),
)


class Tuple(list):
    """Triton's own tuple."""


@dataclass(frozen=True)
class Constexpr:
    """Triton's own constant."""

    value: Any


def triton_call(*args: Any, **settings: Any) -> tuple[Any, ...]:
    """jax-triton's: what it was given."""
    return args, settings


class _Metadata(Distribution):
    """What an installed package says of itself."""

    def __init__(self, name: str, version: str) -> None:
        self.text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        """As of importlib.metadata."""
        return self.text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        """Of a package without files."""
        raise FileNotFoundError(path)


class _Packages(MetaPathFinder, Loader):
    """Imports the stand-ins in the order in which they are asked for, as files would be."""

    def __init__(self, bodies: dict[str, Callable[[ModuleType], None]], versions: dict[str, str]) -> None:
        self.bodies, self.versions = bodies, versions

    def find_distributions(self, context: Any) -> Iterator[Distribution]:
        """As of importlib.metadata, which asks for one by its name."""
        if context.name in self.versions:
            yield _Metadata(context.name, self.versions[context.name])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As of importlib."""
        return ModuleSpec(name, self, is_package=True) if name in self.bodies else None

    def exec_module(self, module: ModuleType) -> None:
        """As of importlib."""
        self.bodies[module.__name__](module)


def fake(
    monkeypatch: Any, version: str = "0.0.17", triton: str = "3.6.0", jax_triton_version: str = "0.4.1"
) -> list[dict[str, Any]]:
    """Install it; the list of calls.

    Args:
        version: of tokamax. jax_triton_version: of that.
        triton: version of that; before 3.7 it has no TMA_TF32.
    """

    def driver(module: ModuleType) -> None:
        if tuple(map(int, triton.split(".")[:2])) >= (3, 7):
            vars(module)["TMA_TF32"] = 11

    def jax_triton(module: ModuleType) -> None:
        import triton.backends.nvidia.compiler as compiler

        try:
            from triton.backends.nvidia.driver import TMA_TF32
        except ImportError:
            vars(module).update(cb=SimpleNamespace(), tf32=0)
        else:
            vars(module).update(cb=compiler, tf32=TMA_TF32)

    def ragged_dot(module: ModuleType) -> None:
        import jax_triton.triton_lib

        vars(module)["jt"] = jax_triton

    def tokamax(module: ModuleType) -> None:
        import tokamax._src.ops.ragged_dot.triton  # noqa: F401

    kernels = PallasMosaicRaggedDot, PallasMosaicRaggedDotConfig, PallasTritonRaggedDot, PallasTritonRaggedDotConfig
    bodies = {name: lambda module: None for name in _EMPTY} | {
        "triton": lambda module: vars(module).update(__version__=triton),
        "triton.language": lambda module: vars(module).update(tuple=Tuple, constexpr=Constexpr),
        "triton.backends.nvidia.driver": driver,
        "jax_triton": lambda module: vars(module).update(triton_call=triton_call, strides_from_shape=len),
        "jax_triton.triton_lib": jax_triton,
        "tokamax": tokamax,
        "tokamax._src.ops.ragged_dot.triton": ragged_dot,
        "tokamax.ops.gpu": lambda module: vars(module).update({kernel.__name__: kernel for kernel in kernels}),
    }
    real = [name for name in sys.modules if name.split(".")[0] in ("triton", "jax_triton", "tokamax")]
    for name in {*real, *bodies}:
        monkeypatch.setitem(sys.modules, name, None)  # forgotten again with the patch
        del sys.modules[name]
    packages = _Packages(bodies, {"tokamax": version, "jax-triton": jax_triton_version})
    monkeypatch.setattr(sys, "meta_path", [packages, *sys.meta_path])
    CALLS.clear()
    jax.clear_caches()
    forget()
    return CALLS
