"""`moebius doctor --explain`: what a layer gets where no backend is named, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moebius.compare.doctor import choice, command, probe_jax, probe_torch
from moebius.compare.doctor.registries import explain
from moebius.core import BackendConfig, ConfigError, measured
from moebius.core.dispatchers import order
from moebius.core.registry import Problem
from moebius.jax_frontend import matmul as jax_matmul
from moebius.torch_frontend import matmul as torch_matmul
from moebius.torch_frontend.dispatch import DISPATCHERS

PROBES = {"torch": probe_torch, "jax": probe_jax}


def state(answer, step, kind="chosen"):
    """{name: what is said after the state} of the backends in that state."""
    rows = [(name, words.partition(": ")) for name, words in answer[step]]
    return {name: why for name, (found, _, why) in rows if found == kind}


@pytest.mark.parametrize("frontend", PROBES)
def test_explain_on_one_rank_chooses_local_and_what_the_frontend_would(frontend):
    answer = PROBES[frontend]._explain("128", "8", "2048", "768", "16384", "1")
    assert state(answer, "dispatch") == {"local": "one rank: nothing moves"}
    assert len(state(answer, "grouped_matmul")) == 1
    assert "D=2048, I=768, 128 experts" in answer["device"]


@pytest.mark.parametrize(("ranks", "wanted"), [(2, "allgather"), (8, "alltoall"), (32, "alltoall")])
def test_explain_over_ranks_in_pytorch_follows_ranks_and_routes(ranks, wanted):
    ((name, why),) = state(probe_torch._explain("128", "8", "2048", "768", "16384", str(ranks)), "dispatch").items()
    assert name == wanted and f"of {ranks} ranks" in why


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_explain_over_ranks_in_flax_is_what_the_modules_choose(ranks):
    from moebius.jax_frontend.dispatch_ranks import choose_dispatcher

    problem = Problem(device="cpu", dtype="bfloat16", dim=64, inter_dim=32, n_experts=128 // ranks, ranks=ranks)
    dispatcher = choose_dispatcher(None, problem, 8, "ep", BackendConfig())
    (name,) = state(probe_jax._explain("128", "8", "64", "32", "64", str(ranks)), "dispatch")
    assert type(dispatcher).__name__.lower() == name
    assert "alltoall" in dict(probe_jax._explain("128", "8", "64", "32", "64", str(ranks))["dispatch"])


def test_lines_say_rows_an_expert_and_name_what_is_chosen_first():
    answers = {name: probe._explain("16", "2", "64", "32", "1000", "4") for name, probe in PROBES.items()}
    text = "\n".join(choice.lines((16, 2, 64, 32, 1000, 4), answers))
    assert "1000 tokens, each to 2 of 16 experts: 125 rows an expert" in text
    assert "4 ranks, 4 experts each; 44% of a rank's tokens have a route to a given other one" in text
    for title in ("tokens to their experts' ranks\n", "the grouped matmul\n"):
        parts = text.split(title)[1:]
        assert len(parts) >= 2
        for part in parts:
            assert part.splitlines()[0].split()[1] == "chosen:"


# ------------------------------------------------------------------------------------------------ what was measured
RUN = measured.Run(
    frontend="torch",
    date="2026-01-02",
    device="A GPU",
    capability=(9, 0),
    dtype="bfloat16",
    versions="v 1",
    command="c",
)
POINT = measured.Point(
    run=RUN,
    layer="Some layer",
    n_experts=16,
    k=2,
    dim=64,
    inter_dim=32,
    tokens=1024,
    tflops={"triton": (500, 520), "grouped_mm": (400, 416)},
)


def explained(monkeypatch, capability, points=(POINT,), tokens=1024, frontend="torch"):
    """The text for PyTorch on a GPU of that capability, None for a CPU."""
    monkeypatch.setattr(measured, "read", lambda: points)
    registry = {"torch": torch_matmul, "jax": jax_matmul}[frontend].BACKENDS
    registries = (registry, DISPATCHERS)
    sizes = (16, 2, 64, 32, tokens, 1)
    answer = explain(frontend, registries, lambda problem, k: order(1, k, available=["local"]), capability, sizes)
    return "\n".join(choice.lines(sizes, {frontend: answer}))


def test_lines_on_a_measured_gpu_name_the_fastest_and_its_figures(monkeypatch):
    pytest.importorskip("triton")
    text = explained(monkeypatch, (9, 0))
    assert "bfloat16 on cuda, D=64, I=32, 16 experts, compute capability 9.0\n" in text
    assert "triton          chosen: the fastest of those that were measured there" in text
    assert "grouped_mm      available: 0.80 of the speed of triton" in text
    assert "loop            available: not measured there" in text
    assert "Some layer, 128 rows an expert, D=64, I=32, weight 1.00: triton 500 / 520, grouped_mm 400 / 416" in text
    assert "A GPU, 2026-01-02, v 1" in text and "with every package" not in text


def test_lines_on_a_cpu_also_tell_of_the_gpus_that_were_measured(monkeypatch):
    here, elsewhere = explained(monkeypatch, None).split("compute capability 9.0, with every package\n")
    assert "chosen: declared first; nothing was measured on cpu" in here
    assert elsewhere.split("\n")[1].startswith("    triton          chosen")


def test_lines_on_another_gpu_say_that_it_was_not_measured(monkeypatch):
    here, elsewhere = explained(monkeypatch, (8, 0)).split("compute capability 9.0, with every package\n")
    assert "grouped_mm      chosen: declared first; nothing was measured in bfloat16 on compute capability 8.0" in here
    assert "triton          available when named" in here and "triton          chosen" in elsewhere


def test_lines_far_from_every_point_say_so(monkeypatch):
    pytest.importorskip("triton")
    text = explained(monkeypatch, (9, 0), tokens=1)
    assert "grouped_mm      chosen: declared first; nothing was measured within 64 times these rows" in text


def test_lines_of_two_that_are_as_fast_say_why_one_is_taken(monkeypatch):
    pytest.importorskip("triton")
    equal = replace(POINT, tflops={"triton": (500, 505), "grouped_mm": (500, 500)})
    text = explained(monkeypatch, (9, 0), points=(equal,))
    assert "grouped_mm      chosen" in text and "triton          available: 1.00 of the speed of grouped_mm" in text


def test_lines_of_the_only_one_that_was_measured_say_so(monkeypatch):
    alone = replace(POINT, run=replace(RUN, frontend="jax"), tflops={"triton": (500, 505)})
    text = explained(monkeypatch, None, points=(alone,), frontend="jax").split("with every package\n")[1]
    assert (
        "triton      chosen: alone was measured there" in text and "tokamax     available: not measured there" in text
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2", "2 numbers"),
        ("8,2,4,4,0", "5 numbers"),
        ("a,b,c,d,e", "not E,K,D,I,T"),
        ("8,9,1,1,1", "9 of 8 experts"),
        ("10,2,8,8,8,4", "10 experts over 4 ranks, 2 left over"),
    ],
)
def test_sizes_that_make_no_layer_are_refused(text, words, capsys):
    with pytest.raises(ConfigError, match=words):
        choice.sizes(text)
    assert command.main(["--explain", text]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("asked: moebius doctor --explain") and not printed.out


def test_sizes_without_ranks_are_of_one():
    assert choice.sizes("128,8,2048,768,16384") == (128, 8, 2048, 768, 16384, 1)


def test_command_explains_in_both_frontends(capsys):
    assert command.main(["--explain", "16,2,64,32,100,4"]) == 0
    printed = capsys.readouterr().out
    assert "PyTorch, bfloat16 on" in printed and "Flax, bfloat16 on" in printed
