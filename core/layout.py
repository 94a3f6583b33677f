"""The one layout of the weights: names, axes and shapes, input-major (x @ W) in memory and in state dicts.

`gate_and_up_projs [E, D, U]`, `down_projs [E, I, D]`, `gate_up_proj_bias [E, U]`, `down_proj_bias [E, D]`: the names
are NeMo Automodel's. Dense projections (router, shared experts, latent) are output-major `[out, in]` in both
frontends, as in torch.nn.Linear and in every published checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from moebius.core.config import MoEConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter: its name inside the layer, its axes and their sizes, and the dtype it is stored in.

    Attributes:
        name: dotted name from the MoE layer, e.g. "experts.down_projs".
        axes: one letter an axis, from the legend in `moebius.core`; lower-case words for others.
        shape: sizes of the axes.
        dtype: of the config, gate_dtype for the router.
        zeros: starts at zero (biases) instead of N(0, std).
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    zeros: bool = False


def experts(config: MoEConfig, ranks: int = 1) -> tuple[Parameter, ...]:
    """Parameters of the routed experts that one of `ranks` ranks holds, in the order in which they are drawn."""
    n, width, inter = config.n_routed_experts // ranks, config.expert_dim, config.moe_inter_dim
    up, dtype = config.activation.up_width(inter), config.dtype
    weights = (
        Parameter(name="gate_and_up_projs", axes=("E", "D", "U"), shape=(n, width, up), dtype=dtype),
        Parameter(name="down_projs", axes=("E", "I", "D"), shape=(n, inter, width), dtype=dtype),
    )
    if not config.expert_bias:
        return weights
    return (
        *weights,
        Parameter(name="gate_up_proj_bias", axes=("E", "U"), shape=(n, up), dtype=dtype, zeros=True),
        Parameter(name="down_proj_bias", axes=("E", "D"), shape=(n, width), dtype=dtype, zeros=True),
    )


def gate(config: MoEConfig) -> tuple[Parameter, ...]:
    """Parameters of the router. The correction bias is no parameter: see `state`."""
    dtype, n = config.gate_dtype or config.dtype, config.n_routed_experts
    weight = Parameter(name="weight", axes=("E", "dim"), shape=(n, config.dim), dtype=dtype)
    if not config.router_bias:
        return (weight,)
    return (weight, Parameter(name="bias", axes=("E",), shape=(n,), dtype=dtype, zeros=True))


def linear(name: str, n_in: int, n_out: int, dtype: str, bias: bool) -> tuple[Parameter, ...]:
    """Parameters of one dense projection, output-major."""
    weight = Parameter(name=f"{name}.weight", axes=("out", "in"), shape=(n_out, n_in), dtype=dtype)
    if not bias:
        return (weight,)
    return (weight, Parameter(name=f"{name}.bias", axes=("out",), shape=(n_out,), dtype=dtype, zeros=True))


def shared_experts(config: MoEConfig) -> tuple[Parameter, ...]:
    """Parameters of the shared experts' MLP; empty without shared experts."""
    if not config.n_shared_experts:
        return ()
    dim, inter, dtype, bias = config.dim, config.shared_inter_dim, config.dtype, config.expert_bias
    gated = config.shared_expert_activation == "swiglu"
    return (
        *(linear("gate_proj", dim, inter, dtype, bias) if gated else ()),
        *linear("up_proj", dim, inter, dtype, bias),
        *linear("down_proj", inter, dim, dtype, bias),
    )


def moe(config: MoEConfig) -> tuple[Parameter, ...]:
    """Every parameter of an MoE layer, with its dotted name."""
    rows = [_within("gate", row) for row in gate(config)] + [_within("experts", row) for row in experts(config)]
    rows += [_within("shared_experts", row) for row in shared_experts(config)]
    if config.n_shared_experts and config.shared_expert_gate:
        rows += linear("shared_expert_gate", config.dim, 1, config.dtype, bias=False)
    if config.moe_latent_size is not None:
        rows += linear("fc1_latent_proj", config.dim, config.moe_latent_size, config.dtype, config.expert_bias)
        rows += linear("fc2_latent_proj", config.moe_latent_size, config.dim, config.dtype, config.expert_bias)
    return tuple(rows)


def state(config: MoEConfig) -> tuple[Parameter, ...]:
    """What a layer holds beside its parameters and a checkpoint holds too, with its dotted name; empty without any.

    The router's correction bias: no gradient moves it, and it is float32 whatever the config's dtypes are, since
    bfloat16 would lose the small steps of its update.
    """
    if not config.has_correction_bias:
        return ()
    name, shape = "gate.e_score_correction_bias", (config.n_routed_experts,)
    return (Parameter(name=name, axes=("E",), shape=shape, dtype="float32", zeros=True),)


def _within(prefix: str, row: Parameter) -> Parameter:
    return Parameter(name=f"{prefix}.{row.name}", axes=row.axes, shape=row.shape, dtype=row.dtype, zeros=row.zeros)
