"""`moebius doctor --explain`: what a layer gets where no backend is named, and why."""

from __future__ import annotations

import pytest

from moebius.compare.doctor import choice, command, probe_jax, probe_torch
from moebius.core import BackendConfig, ConfigError
from moebius.core.registry import Problem

PROBES = {"torch": probe_torch, "jax": probe_jax}


def state(answer, step, kind="chosen"):
    """{name: what is said after the state} of the backends in that state."""
    rows = [(name, words.partition(": ")) for name, words in answer[step]]
    return {name: why for name, (found, _, why) in rows if found == kind}


@pytest.mark.parametrize("frontend", PROBES)
def test_explain_on_one_rank_chooses_local_and_what_the_frontend_would(frontend):
    answer = PROBES[frontend]._explain("128", "8", "2048", "768", "1")
    assert state(answer, "dispatch") == {"local": "one rank: nothing moves"}
    assert len(state(answer, "grouped_matmul")) == 1
    assert "D=2048, I=768, 128 experts" in answer["device"]


@pytest.mark.parametrize(("ranks", "wanted"), [(2, "allgather"), (8, "alltoall"), (32, "alltoall")])
def test_explain_over_ranks_in_pytorch_follows_ranks_and_routes(ranks, wanted):
    ((name, why),) = state(probe_torch._explain("128", "8", "2048", "768", str(ranks)), "dispatch").items()
    assert name == wanted and f"of {ranks} ranks" in why


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_explain_over_ranks_in_flax_is_what_the_modules_choose(ranks):
    from moebius.jax_frontend.dispatch_ranks import choose_dispatcher

    problem = Problem(device="cpu", dtype="bfloat16", dim=64, inter_dim=32, n_experts=128 // ranks, ranks=ranks)
    dispatcher = choose_dispatcher(None, problem, 8, "ep", BackendConfig())
    (name,) = state(probe_jax._explain("128", "8", "64", "32", str(ranks)), "dispatch")
    assert type(dispatcher).__name__.lower() == name
    assert "alltoall" in dict(probe_jax._explain("128", "8", "64", "32", str(ranks))["dispatch"])


def test_lines_say_rows_an_expert_and_name_what_is_chosen_first():
    answers = {name: probe._explain("16", "2", "64", "32", "4") for name, probe in PROBES.items()}
    text = "\n".join(choice.lines((16, 2, 64, 32, 1000, 4), answers))
    assert "1000 tokens, each to 2 of 16 experts: 125 rows an expert" in text
    assert "4 ranks, 4 experts each; 44% of a rank's tokens have a route to a given other one" in text
    for part in text.split("tokens to their experts' ranks\n")[1:]:
        assert part.splitlines()[0].split()[1] == "chosen:"


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
