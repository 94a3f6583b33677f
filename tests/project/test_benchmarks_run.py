"""A run of the GPU benchmark without a GPU: its meter, and a dry run of every candidate."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import automodel
import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import __main__ as command
from benchmarks import gpu_experts, gpu_meter
from benchmarks.gpu_problem import SHAPES, Candidate, Problem, draw
from benchmarks.peers import composite, liger, sonic

TINY = SHAPES["qwen3"].tiny()


# ------------------------------------------------------------------------------------------------------------- meter
@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> gpu_meter.Cuda:
    """The GPU's meter on a CPU; nothing to wait for and nothing to free."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return gpu_meter.Cuda(warmup_ms=1.0, rep_ms=20.0)


@pytest.mark.parametrize(("ms", "rep"), [(1.0, 20.0), (10.0, 60.0)])
def test_times_on_a_gpu_asks_for_enough_runs_and_for_fresh_gradients(
    monkeypatch: pytest.MonkeyPatch, cuda: gpu_meter.Cuda, ms: float, rep: float
) -> None:
    asked: dict[str, Any] = {}

    def do_bench(call: Any, **options: Any) -> list[float]:
        asked.update(options)
        return [1.0, 2.0]

    testing = ModuleType("triton.testing")
    testing.do_bench = do_bench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setattr(cuda, "once", lambda call: ms)
    leaf = torch.ones(1, requires_grad=True)
    assert cuda.times(lambda: None, [leaf], least_runs=5) == [1.0, 2.0]
    assert asked == {"warmup": 1.0, "rep": rep, "grad_to_none": [leaf], "return_mode": "all"}


def test_memory_on_a_gpu_is_what_lies_above_the_inputs(monkeypatch: pytest.MonkeyPatch, cuda: gpu_meter.Cuda) -> None:
    allocated, highest = iter([1000, 1180]), iter([1200, 1300])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(highest))
    leaf = torch.ones(8, requires_grad=True)
    found = cuda.memory(lambda: 2 * leaf, torch.ones(8), [leaf])
    assert found == gpu_meter.Memory(forward=200, kept=180 - 8 * 4, both=300)
    assert leaf.grad is None


def test_syncs_on_a_gpu_are_the_waits_and_not_the_modes_own_warning(
    monkeypatch: pytest.MonkeyPatch, cuda: gpu_meter.Cuda
) -> None:
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        # What PyTorch says once, of the mode itself.
        warnings.warn("a prototype feature and does not yet detect all synchronizing operations", stacklevel=1)

    def wait() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    found = cuda.syncs(wait)
    assert len(found) == 2 and found[0].startswith("test_benchmarks_run.py:")
    assert modes == ["warn", "default"]


# --------------------------------------------------------------------------------------------------------------- run
class _GroupedLinear(nn.Module):
    """Transformer Engine's, as documented: one output-major weight an expert, rows split by a list."""

    def __init__(self, num_gemms: int, n_in: int, n_out: int, *, bias: bool, params_dtype: Any, device: Any):
        super().__init__()
        assert not bias
        for expert in range(num_gemms):
            self.register_parameter(
                f"weight{expert}", nn.Parameter(torch.empty(n_out, n_in, dtype=params_dtype, device=device))
            )

    def forward(self, rows: Tensor, m_splits: list[int]) -> Tensor:
        assert sum(m_splits) == len(rows)
        parts = enumerate(rows.split(m_splits))
        return torch.cat([part @ getattr(self, f"weight{expert}").mT for expert, part in parts])


def _permute(x: Tensor, probs: Tensor, routing_map: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    expert, token = routing_map.T.nonzero(as_tuple=True)
    assert len(token) == n_rows
    return x[token], probs[token, expert], token


def _unpermute(rows: Tensor, token: Tensor, *, restore_shape: Any, map_type: str) -> Tensor:
    assert map_type == "mask"
    return rows.new_zeros(restore_shape).index_add(0, token, rows)


class _LigerExperts:
    """Liger's function, as documented: output-major weights, int32 ids; by autograd."""

    @staticmethod
    def apply(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert ids.dtype == torch.int32 and up.is_contiguous() and down.is_contiguous()
        return composite.experts(x, weights, ids.long(), up.mT, down.mT)


class _SiluMul:
    apply = staticmethod(composite.swiglu)


def _tuned(**block: int) -> SimpleNamespace:
    """A kernel with an autotuner that has the candidate which liger.KEPT keeps, and one that it does not."""
    kept = [SimpleNamespace(kwargs=block, num_warps=8, num_stages=3)]
    return SimpleNamespace(configs=[*kept, SimpleNamespace(kwargs={**block, "BLOCK_K": 1}, num_warps=8, num_stages=5)])


def _liger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for Liger's modules; the one of its kernels."""
    blocks = {name: {"BLOCK_N": 128, "BLOCK_K": 64} for name in liger.KEPT}
    blocks |= {name: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32} for name in liger.KEPT if "_dW" in name}
    blocks["_token_gather_weighted_sum_kernel"] = {"BLOCK_H": 256, "BLOCK_K": 4}
    contents: dict[str, dict[str, Any]] = {
        "ops.fused_moe": {"LigerFusedMoEFunction": _LigerExperts},
        "ops.fused_moe_kernels": {name: _tuned(**block) for name, block in blocks.items()},
        "ops.swiglu": {"LigerSiLUMulFunction": _SiluMul},
    }
    for name in ("liger_kernel", "liger_kernel.ops", *(f"liger_kernel.{name}" for name in contents)):
        module = ModuleType(name)
        vars(module).update(contents.get(name.removeprefix("liger_kernel."), {}))
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["liger_kernel.ops.fused_moe_kernels"]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the peers that are not installed here."""
    automodel.install(monkeypatch)
    _liger(monkeypatch)
    top, layers = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    top.__version__, top.pytorch = "0", layers  # type: ignore[attr-defined]
    vars(layers).update(GroupedLinear=_GroupedLinear, moe_permute_with_probs=_permute, moe_unpermute=_unpermute)
    monkeypatch.setitem(sys.modules, "transformer_engine", top)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", layers)


def _dry(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "figures.json"
    code = gpu_experts.main(["--dry", "--shapes", "qwen3", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


# PyTorch's own: dynamo looks at .grad of whatever it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_dry_run_of_every_candidate_times_each(tmp_path: Path, peers: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = set(gpu_experts.ROWS) - {"te", "gmm", "triton", "sonic"}  # kernels that ask for a GPU
    code, figures = _dry(tmp_path, "--skew", "--only", *rows)
    assert code == 0
    assert {result["row"] for result in figures["results"]} == rows
    for result in figures["results"]:
        assert "reason" not in result, result["reason"]
        assert len(result["forward"]["rounds_ms"]) == len(result["both"]["rounds_ms"]) == 2
    skewed = {"grouped_mm", "compiled", "transformers", "te_layers_compiled"}
    assert {result["row"] for result in figures["skew"]} == skewed
    printed = capsys.readouterr().out
    assert "| best of ours / best peer |" in printed and "| Zipf routing (1.0), TFLOP/s |" in printed


def test_liger_tunes_among_few_of_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _liger(monkeypatch)
    liger.few()
    assert all(len(getattr(kernels, name).configs) == 1 for name in liger.KEPT)


def test_sonic_without_its_packages_says_which_are_missing() -> None:
    with pytest.raises(ImportError, match="not installed: sonicmoe, quack, cutlass; "):
        sonic.build(draw(TINY, "cpu"))


def test_run_of_a_candidate_that_is_not_installed_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    automodel.remove(monkeypatch)
    code, figures = _dry(tmp_path, "--only", "automodel", "composite")
    found = {result["row"]: result for result in figures["results"]}
    assert code == 0
    assert found["automodel"]["reason"].startswith("ModuleNotFoundError: ") and "both" in found["composite"]
    assert f"- NeMo Automodel torch_mm (qwen3): {found['automodel']['reason']}" in capsys.readouterr().out


def test_run_of_a_wrong_candidate_does_not_time_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = composite.experts
    monkeypatch.setattr(composite, "experts", lambda *inputs: 1.1 * right(*inputs))
    code, figures = _dry(tmp_path, "--only", "composite", "default")
    wrong, kept = sorted(figures["results"], key=lambda result: "reason" not in result)
    assert (code, wrong["row"], kept["row"]) == (0, "composite", "default")
    assert wrong["reason"].startswith("ValueError: relative errors") and "both" not in wrong
    assert "both" in kept


def test_run_out_of_time_says_so_in_every_row(tmp_path: Path) -> None:
    code, figures = _dry(tmp_path, "--only", "composite", "default", "--budget", "0")
    assert code == 0
    assert [r["reason"] for r in figures["results"]] == ["TimeoutError: not built, the run's 0 s were over"] * 2


def test_run_that_loses_the_device_ends_with_the_tables_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def broken(problem: Problem, **options: Any) -> Candidate:
        monkeypatch.setattr(gpu_meter.Dry, "wait", lambda self: lost())
        return lost()  # type: ignore[return-value]

    monkeypatch.setattr(composite, "build", broken)
    code, figures = _dry(tmp_path, "--shapes", "qwen3", "dsv3", "--only", "composite")
    assert code == 1
    assert [r["reason"] for r in figures["results"]] == ["RuntimeError: an illegal memory access was encountered"]
    assert "| best of ours / best peer |" in capsys.readouterr().out


def test_benchmarks_of_a_gpu_have_options_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        seen.append(arguments)
        return 3

    monkeypatch.setattr(command, "import_module", lambda name: SimpleNamespace(main=main))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu_experts", "--rep", "5"])
    assert command.main() == 3
    assert seen == [["--rep", "5"]]
