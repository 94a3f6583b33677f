"""Backends: asked before, never replaced.

A backend is one row: an operation, a name, a loader, what it needs, and `supports(problem)`, which returns None or the
reason it cannot serve. A name means that backend or an error; None means the first in declared order that is
available and supports the problem, after those that were measured to be the fastest for such a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from moebius.core.config import MoEConfig
from moebius.core.errors import BackendUnavailable, ConfigError, MoEError, Unsupported

_LAYER = "@"  # before the widths of a layer, in place of a backend's name


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a backend is asked to compute.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of rows and weights.
        dim: D. inter_dim: I. n_experts: e, experts held here. Of a product alone: the matrices' [e, D, I].
        capability: CUDA compute capability; None elsewhere.
        ranks: expert-parallel ranks.
        up_width: U of a whole layer of experts, both of whose products are asked for: [e, D, U] and [e, I, D]; None for
            one product alone, and for what is no product.
        rows: R, of all experts held here together; None for many, as in training.
        split: a compiler may split it over devices, as XLA does outside of shard_map.
    """

    device: str
    dtype: str
    dim: int
    inter_dim: int
    n_experts: int
    capability: tuple[int, int] | None = None
    ranks: int = 1
    up_width: int | None = None
    rows: int | None = None
    split: bool = False

    def __str__(self) -> str:
        return f"{self.dtype} on {self.device}, D={self.dim}, I={self.inter_dim}, {self.n_experts} experts"

    @property
    def widths(self) -> tuple[int, ...]:
        """D, I and, of a whole layer, U."""
        return (self.dim, self.inter_dim) if self.up_width is None else (self.dim, self.inter_dim, self.up_width)

    @property
    def products(self) -> tuple[Problem, ...]:
        """What a backend has to serve: the products of a whole layer, else the problem itself."""
        if self.up_width is None:
            return (self,)
        up = replace(self, inter_dim=self.up_width, up_width=None)
        return up, replace(self, dim=self.inter_dim, inter_dim=self.dim, up_width=None)


def _serves_all(problem: Problem) -> str | None:
    return None


def _nothing() -> None:
    return None


def _unmeasured(problem: Problem, names: Sequence[str]) -> Sequence[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One row of a registry.

    Attributes:
        operation: what it computes, e.g. "grouped_matmul".
        name: what a user writes.
        load: returns the implementation; called once, at first use.
        needs: packages that must be importable.
        install: the command that brings them.
        supports: None where the backend serves the problem, else the reason in words.
        only_when_named: never chosen by default.
        when_measured: chosen by default only where it was measured; see Registry.
        unsplit: runs on one device alone, so that nobody gets it by default where a problem may be split.
        reads_host: fetches device values to the host in each call.
        note: one line for the table of `explain`.
        says: what the loaded backend says of how it computes here, in words, for `moebius doctor`; None for nothing.
        built: this version has it.
    """

    operation: str
    name: str
    load: Callable[[], Any]
    needs: tuple[str, ...] = ()
    install: str = ""
    supports: Callable[[Problem], str | None] = _serves_all
    only_when_named: bool = False
    when_measured: bool = False
    unsplit: bool = False
    reads_host: bool = False
    note: str = ""
    says: Callable[[], str] | None = None
    built: bool = True

    def missing(self) -> str | None:
        """Which of its packages are not installed, in words; None where all are."""
        absent = [package for package in self.needs if _absent(package)]
        return f"not installed: {', '.join(absent)}" if absent else None

    def against(self, problem: Problem) -> str | None:
        """Why it does not serve every product of a problem, in words; None where it does."""
        return next((reason for each in problem.products if (reason := self.supports(each)) is not None), None)


@cache
def _absent(package: str) -> bool:
    return find_spec(package) is None


def of_layer(backend: str | None, config: MoEConfig, share: float = 1.0) -> str:
    """A name for one product of the experts of `config`: `backend`, or for None what is chosen for them all.

    So it can be chosen where the rows are known; see `layer_of`.

    Args:
        share: of the slots that come, those that are routes of the experts held here; see dispatchers.routed_share.
    """
    if backend:
        return backend
    c = config
    told = share, c.expert_dim, c.moe_inter_dim, c.activation.up_width(c.moe_inter_dim)
    return _LAYER + ",".join(map(str, told))


def layer_of(backend: str | None) -> tuple[float, int, int, int] | None:
    """(share, D, I, U) of a layer where `of_layer` made the name, else None."""
    if backend is None or not backend.startswith(_LAYER):
        return None
    share, *widths = backend.removeprefix(_LAYER).split(",")
    dim, inter_dim, width = map(int, widths)
    return float(share), dim, inter_dim, width


def sizes(
    backend: str | None, weight_shape: Sequence[int], down_shape: Sequence[int] | None, n_rows: int | None
) -> tuple[str | None, tuple[int, ...], int | None]:
    """What is chosen for, as (a name or None, [e, D, F] of a product or [e, D, I, U] of a layer, its routed rows).

    Args:
        backend: a name, None, or what `of_layer` made. weight_shape: of a product or, with `down_shape`, of the up
            projection. n_rows: of all slots that came, of which some may be no routes of experts held here.
    """
    layer = layer_of(backend)
    if layer is not None:
        share, *widths = layer
        return None, (weight_shape[0], *widths), None if n_rows is None else round(n_rows * share)
    if down_shape is not None:
        return backend, (*weight_shape[:2], down_shape[1], weight_shape[2]), n_rows
    return backend, tuple(weight_shape), n_rows


@dataclass
class Registry:
    """The backends of one operation of one frontend, in the order in which None tries them.

    Attributes:
        frontend: for messages, e.g. "moebius.torch_frontend".
        operation: what all rows compute.
        measured: (problem, names that can serve it) -> those of them that were measured for such problems, the fastest
            first; they come before the others. See moebius.core.measured.
    """

    frontend: str
    operation: str
    measured: Callable[[Problem, Sequence[str]], Sequence[str]] = _unmeasured
    _rows: dict[str, Backend] = field(default_factory=dict)
    _loaded: dict[str, Any] = field(default_factory=dict)
    _broken: dict[str, str] = field(default_factory=dict)

    def add(self, **row: Any) -> None:
        """Declare a backend; the order of declaration is the order of choice."""
        backend = Backend(operation=self.operation, **row)
        if backend.name in self._rows:
            raise ConfigError(
                f"a second {self.operation} backend {backend.name!r}", "one of that name", "name it otherwise"
            )
        self._rows[backend.name] = backend

    def add_unbuilt(self, *names: str, why: str = "this version does not have it yet") -> None:
        """Declare backends that configs may name and this version refuses, with that reason."""
        for name in names:
            self.add(name=name, load=_nothing, supports=lambda problem: why, only_when_named=True, built=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in declared order, without those that this version does not have yet."""
        return tuple(name for name, row in self._rows.items() if row.built)

    def __getitem__(self, name: str) -> Backend:
        """The row of that name."""
        return self._rows[name]

    def choose(self, name: str | None, problem: Problem) -> Backend:
        """The backend that `name` means for `problem`.

        Args:
            name: a declared name, or None for the first of `ranked`.
        Raises:
            ConfigError: no backend of that name.
            BackendUnavailable: it needs a package that is not here, or whose import fails; says how.
            Unsupported: it cannot serve this problem, or with None no backend can.
        """
        if name is None:
            return self._first(problem)
        asked = f"{self.operation} backend {name!r} of {self.frontend} for {problem}"
        if name not in self._rows:
            raise ConfigError(asked, f"the backends {self.names}", "name one of them, or None to choose")
        backend = self._rows[name]
        missing, reason = backend.missing(), backend.against(problem)
        if missing is not None:
            # Both are said, since installing alone would not help.
            found = missing if reason is None else f"{missing}; and {reason}"
            raise BackendUnavailable(asked, found, f"{backend.install or 'install it'}, or name another backend")
        if reason is not None:
            raise Unsupported(asked, reason, f"name another of {self.names}, or None to choose")
        broken = self.broken(backend)
        if broken is not None:
            raise BackendUnavailable(asked, broken, f"mend it ({backend.install or 'install it'}), or name another")
        return backend

    def broken(self, backend: Backend) -> str | None:
        """Why a backend whose packages are installed does not load, in words; None where it does.

        An optional package with libraries of its own may raise anything on import: OSError where a shared library is
        missing, RuntimeError or AssertionError where a version does not fit. Tried once a process.
        """
        if not backend.needs or backend.name in self._loaded:
            return None
        if backend.name not in self._broken:
            try:
                self.implementation(backend)
            except Exception as error:
                self._broken[backend.name] = f"does not load: {_words(error)}"
        return self._broken.get(backend.name)

    def implementation(self, backend: Backend) -> Any:
        """The loaded implementation of a row of this registry."""
        if backend.name not in self._loaded:
            self._loaded[backend.name] = backend.load()
        return self._loaded[backend.name]

    def candidates(self, problem: Problem, *, installed: bool = True) -> list[Backend]:
        """Those that None may mean for a problem, in declared order.

        Args:
            installed: leave out what is not; False for a machine on which every package is.
        """
        default = [row for row in self._rows.values() if not (row.only_when_named or (row.unsplit and problem.split))]
        able = [row for row in default if row.against(problem) is None]
        if not installed:
            return able
        return [row for row in able if row.missing() is None and row.name not in self._broken]

    def ranked(self, problem: Problem, *, installed: bool = True) -> list[Backend]:
        """`candidates` in the order in which None tries them: what was measured, then the others as declared."""
        able = self.candidates(problem, installed=installed)
        fastest = [self._rows[name] for name in self.measured(problem, [row.name for row in able])]
        return fastest + [row for row in able if row not in fastest and not row.when_measured]

    def explain(self, problem: Problem, *, installed: bool = True) -> list[tuple[str, str]]:
        """(name, "chosen", "available", or the reason against) of every backend, in declared order.

        Loads nothing: a package that is installed and does not load is told of once `choose` has tried it.

        Args:
            installed: as of `candidates`.
        """
        ranked = [backend.name for backend in self.ranked(problem, installed=installed)]
        rows = []
        for name, backend in self._rows.items():
            missing, broken = (backend.missing(), self._broken.get(name)) if installed else (None, None)
            state = "available" if name in ranked else "available when named"
            if problem.split and backend.unsplit:
                state += ", or where nothing is split over devices"
            reason = missing or backend.against(problem) or broken
            rows.append((name, reason or ("chosen" if name in ranked[:1] else state)))
        return rows

    def _first(self, problem: Problem) -> Backend:
        while ranked := self.ranked(problem):  # without those that turned out not to load
            if self.broken(ranked[0]) is None:
                return ranked[0]
        reasons = "; ".join(f"{name}: {state}" for name, state in self.explain(problem))
        raise Unsupported(f"{self.operation} of {self.frontend} for {problem}", reasons, "change the dtype or install")


def _words(error: Exception) -> str:
    """An error in one line; of one of moebius' own what it found."""
    text = error.found if isinstance(error, MoEError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
