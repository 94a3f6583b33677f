"""The meaning of a mixture-of-experts layer, free of any framework.

`core` is data that both frontends play: tables (activations, routing rules, layouts), records (configs, problems)
and rules (precision, backends, errors). What cannot be a table is `core.reference`, a float64 specification that
runs. It imports the standard library and NumPy alone, so that neither frontend can lean on the other through it.

Axes, the one legend of the project:

    T  tokens on this rank            K  experts per token (top-k)
    E  routed experts                 e  routed experts held by this rank
    D  model width (of the experts)   I  hidden width of one expert
    U  width of the first projection: 2 I for a gated activation, else I
    S  tokens after dispatch          R  rows: one per (token, slot), sorted by expert
    F  any output width               G  expert groups

A tensor wears its axes: `x_TD`, `rows_RD`, `hidden_RU`.
"""

if __name__ != "moebius.core":
    raise ImportError(f"this folder is the package moebius.core; import it by that name, not as {__name__!r}")

from moebius.core.activations import ACTIVATIONS, Activation
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import (
    BackendUnavailable,
    CheckpointError,
    ConfigError,
    DTypeError,
    MoEError,
    MoEWarning,
    RankLost,
    RoutingError,
    ShapeError,
    StateDictError,
    Unsupported,
)
from moebius.core.routing import ROUTING_RULES, RoutingRule

__all__ = [
    "ACTIVATIONS",
    "ROUTING_RULES",
    "Activation",
    "BackendConfig",
    "BackendUnavailable",
    "CheckpointError",
    "ConfigError",
    "DTypeError",
    "MoEConfig",
    "MoEError",
    "MoEWarning",
    "RankLost",
    "RoutingError",
    "RoutingRule",
    "ShapeError",
    "StateDictError",
    "Unsupported",
]
