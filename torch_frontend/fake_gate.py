"""A router that looks at nothing: even routing for benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError


class FakeBalancedGate(nn.Module):
    """Routes evenly without looking at the values: for benchmarks.

    Args:
        config: MoEConfig, or any object with its attributes.
        skip_first_n_experts: leave these experts out.
        noise: 0 for a fixed cycle; up to 1 for random weights and popularity, drawn from a seed taken from x, so
            that a recomputation of the same x agrees. The seed is read from the device: with noise the host waits
            for x once a call, without it never.
    """

    bias_update_factor = 0.0

    def __init__(self, config: Any, skip_first_n_experts: int = 0, noise: float = 0.0):
        super().__init__()
        self.config = MoEConfig.of(config)
        self.skip_first_n_experts = skip_first_n_experts
        self.noise = noise
        available = self.config.n_routed_experts - skip_first_n_experts
        if not 0 <= skip_first_n_experts or available < self.config.n_activated_experts:
            raise ConfigError(
                f"skip_first_n_experts={skip_first_n_experts}",
                f"{self.config.n_routed_experts} experts, {self.config.n_activated_experts} per token",
                "leave at least as many experts as a token uses",
            )

    def forward(
        self, x: Tensor, token_mask: Tensor, cp_mesh: Any = None, n_sequences: int = 1
    ) -> tuple[Tensor, Tensor, None]:
        """(weights [T, K] in x.dtype, indices [T, K] int32, None); only x has an effect."""
        checks.tokens(x, self.config.dim)
        T, K = x.shape[0], self.config.n_activated_experts
        available = self.config.n_routed_experts - self.skip_first_n_experts
        if self.noise > 0:
            weights_TK, ids_TK = self._draw(x, available)
        else:
            ids_TK = torch.arange(T * K, device=x.device).view(T, K) % available
            weights_TK = torch.full((T, K), 1.0 / K, device=x.device)
        return weights_TK.to(x.dtype), (ids_TK + self.skip_first_n_experts).to(torch.int32), None

    def _draw(self, x: Tensor, available: int) -> tuple[Tensor, Tensor]:
        T, K = x.shape[0], self.config.n_activated_experts
        seed = int((1e6 * x.detach().flatten()[:4].float().sum()).nan_to_num()) & 0x7FFFFFFF
        generator = torch.Generator(x.device).manual_seed(seed)
        random_TK = torch.rand(T, K, generator=generator, device=x.device)
        random_TK = random_TK / random_TK.sum(-1, keepdim=True)
        weights_TK = (1.0 - self.noise) / K + self.noise * random_TK
        popularity_E = torch.randn(available, generator=generator, device=x.device) * self.noise * 0.1
        score_TE = torch.rand(T, available, generator=generator, device=x.device) + popularity_E
        return weights_TK, score_TE.topk(K, dim=-1).indices

    def update_bias(self, group: Any = None) -> None:
        """Nothing: there is no bias."""

    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Nothing: there are no parameters."""
