"""What the kernels need of JAX's side, and say where it is not there; tests/cross/test_launch.py has the launches."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from moebius.core.errors import BackendUnavailable
from moebius.core.kernels import plan_grouped
from moebius.jax_frontend import launch, play


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"jax-triton": "0.4.0", "jaxlib": "0.11.2"}, "jax-triton 0.4.0, not 0.4.1"),
        ({"jax-triton": "0.4.1", "jaxlib": "0.11.0"}, "jaxlib 0.11.0, not 0.11.1"),
    ],
)
def test_load_of_packages_that_are_too_old_is_refused(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], said: str
) -> None:
    monkeypatch.setattr(play, "version", versions.__getitem__)
    with pytest.raises(BackendUnavailable, match=said):
        play.load()


def test_where_asks_the_device_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = jnp.zeros((2, 8), jnp.bfloat16)
    monkeypatch.setattr(launch, "_processors", lambda capability: 108)
    monkeypatch.setattr(launch, "device_of", lambda rows: ("cuda", (8, 0)))
    assert launch._where(rows) == ("bfloat16", plan_grouped.Device((8, 0), 108))
    monkeypatch.setattr(launch, "device_of", lambda rows: ("cpu", None))
    assert launch._where(rows)[1].capability == (9, 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch._where(rows)[1] == plan_grouped.INTERPRETER
