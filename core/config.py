"""What a layer is (`MoEConfig`) and how it is computed (`BackendConfig`).

Field names and meaning are those of NeMo Automodel's configs, so one of its objects works where one of these does:
`MoEConfig.of` takes any object with the attributes. Where the original demands a value that most layers leave alone,
there is a default here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from moebius.core import activations, checks, routing
from moebius.core.activations import Activation
from moebius.core.errors import ConfigError, MoEWarning, Unsupported
from moebius.core.precision import dtype_name
from moebius.core.routing import RoutingRule

_Config = TypeVar("_Config", bound="_FromAttributes")

SHARED_EXPERT_ACTIVATIONS = ("swiglu", "relu2")
# Every backend name that either frontend knows, and the original's names for two of them.
EXPERT_BACKENDS = ("loop", "grouped_mm", "gmm", "te", "triton", "ragged_dot", "tokamax", "torch_mm_mxfp8")
EXPERT_BACKEND_ALIASES = {"torch": "loop", "torch_mm": "grouped_mm"}
STEP_BACKENDS = ("xla", "te")  # of permute and route; "xla" is moebius' own
REMATS = ("none", "act", "full")
ON_OVERFLOW = ("count", "poison")
LINEAR_BACKENDS = ("torch", "te", "quack")
DISPATCHERS = (
    "local",
    "torch",
    "allgather",
    "alltoall",
    "ragged_all_to_all",
    "deepep",
    "deepep_elastic",
    "hybridep",
    "uccl_ep",
    "te",
    "mok",
)


@dataclass(frozen=True, kw_only=True)
class _FromAttributes:
    @classmethod
    def of(cls: type[_Config], source: Any) -> _Config:
        """`source` itself, or a config read off any object with these attributes (None: all defaults).

        Raises:
            ConfigError: an attribute without a default is missing, or a value is invalid.
        """
        if isinstance(source, cls):
            return source
        values, missing = {}, []
        for field in fields(cls):
            if hasattr(source, field.name):
                values[field.name] = getattr(source, field.name)
            elif field.default is MISSING:
                missing.append(field.name)
        if missing:
            raise ConfigError(
                f"a {cls.__name__} from a {type(source).__name__}",
                f"no attribute {', '.join(missing)}",
                f"pass a {cls.__name__}, or an object with all of its required attributes",
            )
        if source is not None and not values:
            raise ConfigError(
                f"a {cls.__name__} from {source!r}",
                f"a {type(source).__name__} with none of its attributes",
                f"pass a {cls.__name__}, or an object with its attributes",
            )
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(_FromAttributes):
    """One mixture-of-experts layer. Frozen and checked: an instance is valid.

    Attributes:
        n_routed_experts: E, experts that the router chooses from.
        n_activated_experts: K, experts per token.
        dim: width of the layer's input and output.
        moe_inter_dim: I, hidden width of one routed expert.
        n_shared_experts: experts that every token visits; their widths add up to one MLP.
        n_expert_groups, n_limited_groups: G groups, of which a token may use this many; 0 or 1 groups: no limit.
        train_gate: the router's weight takes gradients.
        gate_bias_update_factor: step of the correction bias; 0 for no update.
        aux_loss_coeff: factor of the load-balancing loss over all tokens of a call; 0 for none.
        z_loss_coeff: factor of the z-loss, the mean square of the logits' logsumexp; 0 for none.
        seq_aux_loss_coeff: factor of the load-balancing loss within each sequence; 0 for none.
        score_func: one of moebius.core.routing.SCORE_FUNCTIONS.
        route_scale: factor of the routing weights, after normalisation.
        inter_dim: hidden width of the model's dense MLP; not used by the experts.
        norm_topk_prob: routing weights of a token sum to 1 before route_scale (where K > 1).
        router_bias: a learnable bias on the logits.
        expert_bias: biases in the experts, the shared experts and the latent projections.
        expert_activation: one of moebius.core.activations.CONFIG_ACTIVATIONS.
        apply_router_weight_after_down: weight the down projection's output instead of its input.
        activation_alpha, activation_limit: of swigluoai and quick_geglu.
        swiglu_limit: > 0 clamps swiglu, in routed and shared experts.
        softmax_before_topk: score_func "softmax" normalises over all experts before the choice.
        router_weights_fp32: the gate returns float32 weights (float64 for float64), not x.dtype.
        router_weight_uses_score_correction_bias: score_func "sigmoid" takes the weights from the biased scores.
        dtype: of the parameters, kept as a plain string.
        gate_dtype: of the router's parameters; None for dtype.
        shared_expert_gate: a sigmoid gate on the shared experts' output.
        shared_expert_inter_dim: hidden width per shared expert; None or 0 for moe_inter_dim.
        shared_expert_activation: "swiglu" or "relu2".
        force_e_score_correction_bias: hold a correction bias even when nothing updates it.
        moe_latent_size: routed experts work in this width, between two projections.
        enable_routing_replay: attach a record and replay handle to the gate.

    Raises:
        ConfigError: a value is out of range or two contradict each other.
    """

    n_routed_experts: int
    n_activated_experts: int
    dim: int
    moe_inter_dim: int
    n_shared_experts: int = 0
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    train_gate: bool = True
    gate_bias_update_factor: float = 0.0
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    seq_aux_loss_coeff: float = 0.0
    score_func: str = "softmax"
    route_scale: float = 1.0
    inter_dim: int | None = None
    norm_topk_prob: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    expert_activation: str = "swiglu"
    apply_router_weight_after_down: bool = False
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    swiglu_limit: float = 0.0
    softmax_before_topk: bool = False
    router_weights_fp32: bool = False
    router_weight_uses_score_correction_bias: bool = False
    dtype: Any = "bfloat16"
    gate_dtype: Any = None
    shared_expert_gate: bool = False
    shared_expert_inter_dim: int | None = None
    shared_expert_activation: str = "swiglu"
    force_e_score_correction_bias: bool = False
    moe_latent_size: int | None = None
    enable_routing_replay: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.gate_dtype is not None:
            object.__setattr__(self, "gate_dtype", dtype_name(self.gate_dtype))
        self._check_sizes()
        self._check_routing()
        activations.resolve(self.expert_activation, self)
        if self.shared_expert_activation not in SHARED_EXPERT_ACTIVATIONS:
            raise ConfigError(
                f"shared_expert_activation {self.shared_expert_activation!r}",
                f"the activations {SHARED_EXPERT_ACTIVATIONS}",
                "name one of them",
            )
        self._warn_of_ignored()

    def _check_sizes(self) -> None:
        for name in ("n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim"):
            _integer(name, getattr(self, name), least=1)
        for name in ("n_shared_experts", "n_expert_groups", "n_limited_groups"):
            _integer(name, getattr(self, name), least=0)
        for name, least in (("moe_latent_size", 1), ("shared_expert_inter_dim", 0)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), least)
        for name in ("gate_bias_update_factor", *(f"{loss}_coeff" for loss in routing.LOSSES)):
            _number(name, getattr(self, name), least=0.0)
        for name in ("route_scale", "activation_alpha", "activation_limit", "swiglu_limit"):
            _number(name, getattr(self, name))
        if self.n_activated_experts > self.n_routed_experts:
            raise ConfigError(
                f"n_activated_experts={self.n_activated_experts} experts per token",
                f"n_routed_experts={self.n_routed_experts}",
                "choose at most as many experts as there are",
            )

    def _check_routing(self) -> None:
        rule = self.routing_rule
        if self.gate_bias_update_factor > 0 and not self.train_gate:
            raise ConfigError(
                f"gate_bias_update_factor={self.gate_bias_update_factor} with train_gate=False",
                "a correction bias is updated only while the gate trains",
                "set train_gate=True or gate_bias_update_factor=0",
            )
        if rule.group_fill is None or self.n_expert_groups <= 1:
            return
        per_group, rest = divmod(self.n_routed_experts, self.n_expert_groups)
        if rest:
            raise ConfigError(
                f"n_expert_groups={self.n_expert_groups}",
                f"n_routed_experts={self.n_routed_experts}, which it does not divide",
                "use groups of equal size",
            )
        if not 1 <= self.n_limited_groups <= self.n_expert_groups:
            raise ConfigError(
                f"n_limited_groups={self.n_limited_groups}",
                f"n_expert_groups={self.n_expert_groups}",
                "limit a token to between 1 and all of the groups",
            )
        if per_group * self.n_limited_groups < self.n_activated_experts:
            raise ConfigError(
                f"n_activated_experts={self.n_activated_experts} from {self.n_limited_groups} groups",
                f"{per_group} experts per group",
                "raise n_limited_groups or lower n_activated_experts",
            )

    def _warn_of_ignored(self) -> None:
        rule, ignored = self.routing_rule, []
        if rule.group_fill is None and self.n_expert_groups > 1:
            ignored.append(f"n_expert_groups={self.n_expert_groups}")
        if not rule.uses_bias and self.gate_bias_update_factor > 0:
            ignored.append(f"gate_bias_update_factor={self.gate_bias_update_factor}")
        if not rule.uses_bias and self.force_e_score_correction_bias:
            ignored.append("force_e_score_correction_bias=True")
        if ignored:
            warnings.warn(
                f"score_func {self.score_func!r} ignores {', '.join(ignored)}: routing is the same without",
                MoEWarning,
                stacklevel=4,
            )

    @property
    def activation(self) -> Activation:
        """The resolved row of the routed experts' activation."""
        return activations.resolve(self.expert_activation, self)

    @property
    def routing_rule(self) -> RoutingRule:
        """The resolved row of the score function."""
        return routing.resolve(self.score_func, self)

    @property
    def expert_dim(self) -> int:
        """Width that the routed experts read and write: the latent size where there is one."""
        return self.dim if self.moe_latent_size is None else self.moe_latent_size

    @property
    def losses(self) -> dict[str, float]:
        """The router's losses that the config asks for, of moebius.core.routing.LOSSES, with their coefficients."""
        coefficients = {name: float(getattr(self, f"{name}_coeff")) for name in routing.LOSSES}
        return {name: coefficient for name, coefficient in coefficients.items() if coefficient > 0}

    @property
    def has_correction_bias(self) -> bool:
        """Whether the gate holds a correction bias."""
        return self.gate_bias_update_factor > 0 or self.force_e_score_correction_bias

    @property
    def shared_inter_dim(self) -> int:
        """Hidden width of the one MLP that all shared experts form; 0 without any."""
        return self.n_shared_experts * (self.shared_expert_inter_dim or self.moe_inter_dim)


@dataclass(frozen=True, kw_only=True)
class BackendConfig(_FromAttributes):
    """How a layer is computed. None means: choose when the layer is built.

    Attributes:
        linear: of the dense projections, one of LINEAR_BACKENDS; "torch" or None means the framework's own.
        experts: backend of the grouped matmul, one of EXPERT_BACKENDS, or the original's "torch", "torch_mm".
        dispatcher: how tokens reach other ranks, one of DISPATCHERS.
        combine_dtype: in which each rank's part of the output travels to the token's rank, where they are added in
            promote_types(dtype, float32); None for x's dtype, rounded once more than on one rank.
        dispatcher_bound: of the dispatcher "alltoall" in Flax, where shapes are static: tokens that one device sends
            another at most in one call; None for all that it has, which drops nothing and sends as much as "allgather".
        dispatcher_on_overflow: what of routes that find no room within the bound, one of ON_OVERFLOW. "count": they
            count as no route, and the experts record how many. "poison": their tokens' outputs are NaN.
        dispatcher_max_tokens: in PyTorch, no rank has more tokens in any call, alike on all ranks: "allgather", taken
            where none is named, and DeepEP's kin then read nothing on the host, and travel and compute as if every rank
            had as many. "te" needs it: it is made for a number of tokens. None to count them, which "alltoall" has to.
        dispatcher_num_sms, dispatcher_share_token_dispatcher, dispatcher_async_dispatch: of the DeepEP dispatchers.
        fake_balanced_gate: route evenly without looking at x, for benchmarks.
        fake_gate_noise: share of randomness in the fake gate, 0 to 1.
        gate_precision: dtype the router computes its logits in; None for x.dtype.
        te_fp8: Transformer Engine's FP8 recipe; needs experts or linear "te".
        checks: "full" also checks values (non-finite weights, ids out of range), at the price of reading them;
            None for the environment's MOEBIUS_CHECKS, else "off".
        double_backward: keep each step of the experts in the graph, so that gradients have gradients (in Flax forward
            mode too), at the price of memory; by default the experts are one operator, differentiable once.
        remat: what the experts' backward pass computes again, one of REMATS: "none" keeps the activation's output too,
            "act" x, the pre-activation and the routing, "full" x and the routing alone. PyTorch has "act" alone,
            and Flax's "triton" takes "none" for it.
        permute, route: backends of these steps, one of STEP_BACKENDS; None for moebius' own. Flax alone. With "te" they
            have reverse mode alone, and with permute="te" every step of the experts is kept.
        enable_fsdp_optimizations: kept for the original's configs; has no effect here.

    Raises:
        ConfigError: an unknown name or a contradiction.
    """

    linear: str | None = None
    experts: str | None = None
    dispatcher: str | None = None
    combine_dtype: Any = None
    dispatcher_bound: int | None = None
    dispatcher_on_overflow: str | None = None
    dispatcher_max_tokens: int | None = None
    dispatcher_num_sms: int = 20
    dispatcher_share_token_dispatcher: bool = True
    dispatcher_async_dispatch: bool = False
    fake_balanced_gate: bool = False
    fake_gate_noise: float = 0.0
    gate_precision: Any = None
    te_fp8: Any = None
    checks: Literal["off", "full"] | None = None
    double_backward: bool = False
    remat: str = "act"
    permute: str | None = None
    route: str | None = None
    enable_fsdp_optimizations: bool = False

    def __post_init__(self) -> None:
        for name in ("gate_precision", "combine_dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, dtype_name(getattr(self, name)))
        if self.experts is not None:
            name = EXPERT_BACKEND_ALIASES.get(self.experts, self.experts)
            _one_of("experts", name, EXPERT_BACKENDS, extra=tuple(EXPERT_BACKEND_ALIASES))
            object.__setattr__(self, "experts", name)
        if self.linear is not None:
            _one_of("linear", self.linear, LINEAR_BACKENDS)
        if self.dispatcher is not None:
            _one_of("dispatcher", self.dispatcher, DISPATCHERS)
        for name in ("dispatcher_bound", "dispatcher_max_tokens"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        if self.dispatcher_on_overflow is not None:
            _one_of("dispatcher_on_overflow", self.dispatcher_on_overflow, ON_OVERFLOW)
        _one_of("remat", self.remat, REMATS)
        for name in ("permute", "route"):
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), STEP_BACKENDS)
        self._check_derivatives()
        if self.checks is None:
            object.__setattr__(self, "checks", checks.environment())
        _one_of("checks", self.checks, checks.MODES)
        if not isinstance(self.fake_gate_noise, Real) or not 0.0 <= self.fake_gate_noise <= 1.0:
            raise ConfigError(f"fake_gate_noise={self.fake_gate_noise}", "a share outside [0, 1]", "use 0 to 1")
        if self.te_fp8 is not None and "te" not in (self.experts, self.linear):
            raise ConfigError(
                "te_fp8",
                f"experts={self.experts!r}, linear={self.linear!r}",
                "set experts='te' or linear='te', or leave te_fp8 out",
            )

    def _check_derivatives(self) -> None:
        named = [f"{name}='te'" for name in ("permute", "route") if getattr(self, name) == "te"]
        if self.double_backward and named:
            asked = f"double_backward=True with {', '.join(named)}"
            raise ConfigError(asked, "Transformer Engine's steps have gradients once", "leave one of them out")
        if self.remat != "act" and (self.double_backward or self.permute == "te"):
            other = "double_backward=True" if self.double_backward else "permute='te'"
            asked = f"remat={self.remat!r} with {other}"
            raise ConfigError(asked, f"{other} keeps every step of the experts", "leave one of them out")

    def require_own_linear(self) -> None:
        """Refuse a `linear` or `te_fp8` that only Transformer Engine or QuACK could serve.

        Raises:
            Unsupported: one was named.
        """
        if self.linear not in (None, "torch") or self.te_fp8 is not None:
            asked = f"linear={self.linear!r}, te_fp8={self.te_fp8!r}"
            raise Unsupported(asked, "dense projections run in the framework alone", "leave both out")


def _integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}", f"not an integer of {least} or more", f"use {least} or more")


def _number(name: str, value: Any, least: float = -math.inf) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        size = "" if least == -math.inf else f" of {least:g} or more"
        raise ConfigError(f"{name}={value!r}", f"not a finite number{size}", f"use a number{size}")


def _one_of(name: str, value: Any, choices: tuple[str, ...], extra: tuple[str, ...] = ()) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}", f"the choices {choices + extra}", "name one of them")
