"""Every error of moebius: what was asked, what was found, what to do.

Each class is also the built-in that a caller would expect (`ValueError`, `ImportError`, ...), so code that knows
nothing of moebius still catches it.
"""


class MoEError(Exception):
    """Base of every error that moebius raises on purpose.

    Args:
        asked: what the call asked for, with its values.
        found: what is there instead.
        do: the next step that mends it.
    """

    def __init__(self, asked: str, found: str, do: str):
        super().__init__(asked, found, do)
        self.asked, self.found, self.do = asked, found, do

    def __str__(self) -> str:
        return f"asked: {self.asked}\nfound: {self.found}\ndo: {self.do}"


class ConfigError(MoEError, ValueError):
    """A config that contradicts itself, or a name that no table holds."""


class ShapeError(MoEError, ValueError):
    """An array of the wrong rank or size."""


class DTypeError(MoEError, TypeError):
    """An array of the wrong dtype or kind."""


class RoutingError(MoEError, ValueError):
    """Routing values that no router should give: non-finite weights, ids out of range, impossible group sizes."""


class BackendUnavailable(MoEError, ImportError):
    """A backend that was named but is not installed, or does not load here."""


class Unsupported(MoEError, NotImplementedError):
    """A backend or feature that is present and cannot serve this problem."""


class RankLost(MoEError, RuntimeError):
    """A collective without all of its ranks; a RuntimeError, as what torch.distributed raises.

    Args:
        asked, found, do: see MoEError.
        missing: global ranks that are gone; none where all live and do not meet.
        layer: its qualified name, or its number. step: how many forward passes it had begun. phase: of that pass.
    """

    def __init__(
        self,
        asked: str,
        found: str,
        do: str,
        missing: tuple[int, ...] = (),
        layer: str | None = None,
        step: int | None = None,
        phase: str | None = None,
    ):
        super().__init__(asked, found, do)
        self.missing, self.layer, self.step, self.phase = missing, layer, step, phase


class CheckpointError(MoEError, ValueError):
    """A checkpoint that is incomplete, damaged, or of a kind that is not known."""


class StateDictError(CheckpointError, RuntimeError):
    """A state dict that a module cannot take; a RuntimeError, as torch's own."""


class MoEWarning(UserWarning):
    """Something was accepted that has no effect."""
