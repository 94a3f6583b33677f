"""The documented modules: moebius' own, with the documented constructors and the methods that callers reach for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moebius.core.config import BackendConfig
from moebius.torch_frontend.automodel.activation import get_expert_activation_for_deepep
from moebius.torch_frontend.dispatch import Local, Sent
from moebius.torch_frontend.experts import WeightedActivation, steps
from moebius.torch_frontend.grouped_experts import GroupedExperts as Experts
from moebius.torch_frontend.grouped_experts import GroupedExpertsDeepEP as ExpertsDeepEP
from moebius.torch_frontend.grouped_experts import GroupedExpertsTE as ExpertsTE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_NAMES = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias")


def _init_weights(module: nn.Module, buffer_device: Any, init_std: float = 0.02) -> None:
    """Draw the weights of an experts module from N(0, init_std), biases zero; any other module is left alone.

    For `model.apply`.

    Args:
        buffer_device: accepted for the original's callers; parameters stay where they are.
    """
    if isinstance(module, (Experts, ExpertsDeepEP, ExpertsTE)):
        module.init_weights(buffer_device, init_std)


def _get_activation(module: Any) -> WeightedActivation:
    """What is computed between the projections: the one assigned, else the config's."""
    assigned: WeightedActivation | None = module._activation
    return get_expert_activation_for_deepep(module.config) if assigned is None else assigned


def _set_activation(module: Any, value: WeightedActivation | None) -> None:
    module._activation = value


class _Documented:
    """The documented attributes that all three modules share.

    Attributes:
        use_torch_mm: whether `backend.experts` names torch's grouped product. use_mxfp8: whether in MXFP8. Plain
            attributes, since subclasses assign them.
    """

    backend: BackendConfig
    use_torch_mm: bool
    use_mxfp8: bool

    def _describe(self) -> None:
        self.use_mxfp8 = self.backend.experts == "torch_mm_mxfp8"
        self.use_torch_mm = self.backend.experts == "grouped_mm" or self.use_mxfp8


class GroupedExperts(_Documented, Experts):
    """moebius' GroupedExperts with the documented constructor.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None.

    Attributes:
        expert_activation_grouped: f(hidden [N, U], weights [N, 1]) -> [N, I], assignable.
    """

    expert_activation_grouped = property(_get_activation, _set_activation)

    def __init__(self, config: Any, backend: Any = None):
        super().__init__(config, backend)
        self._describe()

    def _forward_loop(
        self,
        x: Float[Tensor, "T D"],
        weights: Float[Tensor, "T K"],
        indices: Int[Tensor, "T K"],
        token_mask: Bool[Tensor, " T"],
        gate_and_up_projs: Float[Tensor, "e D U"],
        down_projs: Float[Tensor, "e I D"],
        gate_up_proj_bias: Float[Tensor, "e U"] | None,
        down_proj_bias: Float[Tensor, "e D"] | None,
        n_local_experts: int,
        experts_start_idx: int,
        experts_end_idx: int,
    ) -> Tensor:
        """The sum over the experts [start, end) by one product an expert; see `_forward_grouped_mm`."""
        parameters = gate_and_up_projs, down_projs, gate_up_proj_bias, down_proj_bias
        sent = _sent(x, token_mask, weights, indices, n_local_experts, experts_start_idx, experts_end_idx)
        return self._sum("loop", sent, parameters)

    def _forward_grouped_mm(
        self,
        x: Float[Tensor, "T D"],
        token_mask: Bool[Tensor, " T"],
        weights: Float[Tensor, "T K"],
        indices: Int[Tensor, "T K"],
        gate_and_up_projs: Float[Tensor, "e D U"],
        down_projs: Float[Tensor, "e I D"],
        gate_up_proj_bias: Float[Tensor, "e U"] | None,
        down_proj_bias: Float[Tensor, "e D"] | None,
        n_local_experts: int,
        experts_start_idx: int,
    ) -> Tensor:
        """The sum over this rank's experts [start, start + n) by grouped products, not rounded.

        Args:
            x: [T, D]. token_mask: [T] bool. weights, indices: [T, K]; ids of all ranks.
            gate_and_up_projs: [n, D, U]. down_projs: [n, I, D]. gate_up_proj_bias, down_proj_bias: [n, U] and [n, D],
                or None. Plain tensors in x's dtype.
        Returns:
            [T, D], promote_types(x.dtype, float32); [T, K, D], each slot's summand, where the config weights after the
            down projection.
        """
        parameters = gate_and_up_projs, down_projs, gate_up_proj_bias, down_proj_bias
        end = experts_start_idx + n_local_experts
        sent = _sent(x, token_mask, weights, indices, n_local_experts, experts_start_idx, end)
        return self._sum("torch_mm_mxfp8" if self.use_mxfp8 else "grouped_mm", sent, parameters)

    def _sum(self, backend: str, sent: Sent, parameters: tuple[Tensor | None, ...]) -> Tensor:
        p = {name: value for name, value in zip(_NAMES, parameters, strict=True) if value is not None}
        slots, (tokens, k) = self.config.apply_router_weight_after_down, sent.ids_SK.shape
        if slots:  # every slot a token of its own, so that none are summed
            sent = Sent(sent.x_SD.repeat_interleave(k, 0), sent.weights_SK.view(-1, 1), sent.ids_SK.view(-1, 1))
        y = steps(p, sent, self.config, backend, partial=True, activation=self._activation)
        return y.view(tokens, k, -1) if slots else y


class GroupedExpertsDeepEP(_Documented, ExpertsDeepEP):
    """moebius' GroupedExpertsDeepEP with the documented constructor.

    Args:
        config, backend: as in GroupedExperts.
        dispatcher_backend: how tokens reach other ranks. The others: of DeepEP.

    Attributes:
        expert_activation: f(hidden [N, U], weights [N, 1]) -> [N, I], assignable.
    """

    expert_activation = property(_get_activation, _set_activation)

    def __init__(
        self,
        config: Any,
        backend: Any = None,
        dispatcher_backend: str = "deepep",
        dispatcher_num_sms: int = 20,
        dispatcher_share_token_dispatcher: bool = True,
        dispatcher_async_dispatch: bool = False,
    ):
        super().__init__(
            config,
            backend,
            dispatcher_backend,
            dispatcher_num_sms,
            dispatcher_share_token_dispatcher,
            dispatcher_async_dispatch,
        )
        self._describe()

    def _init_deepep_buffer(self, ep_group: Any) -> None:
        """Build the dispatcher over `ep_group` now, and with it the buffers of a library.

        Made in a forward pass, activation checkpointing would hold them. It is the one of `dispatcher_backend`, and
        takes the place of one that was there; on one rank nothing is built. Parameters stay where they are.

        Args:
            ep_group: torch.distributed process group of the ranks that share the experts.
        Raises:
            BackendUnavailable, Unsupported: the library is not here, or does not serve so many ranks.
        """
        self._take(self._built(self.dispatcher_backend, ep_group) if ep_group.size() > 1 else Local())


def _sent(
    x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor, n_experts: int, start: int, end: int
) -> Sent:
    """This rank's routes, with ids counted from `start`; ids outside [start, end) are none."""
    local_TK = torch.where(indices < end, indices - start, -1)
    return Local().dispatch(x, weights, local_TK, token_mask, n_experts)[0]
