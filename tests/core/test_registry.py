"""Choosing a backend: by name or the first that serves, never another than was asked for."""

from dataclasses import replace

import pytest

from moebius.core.config import MoEConfig
from moebius.core.errors import BackendUnavailable, ConfigError, Unsupported
from moebius.core.registry import Problem, Registry, layer_of, of_layer, sizes

CPU = Problem(device="cpu", dtype="float32", dim=8, inter_dim=4, n_experts=2)
GPU = Problem(device="cuda", dtype="bfloat16", dim=8, inter_dim=4, n_experts=2, capability=(9, 0))


def only(device):
    return lambda problem: None if problem.device == device else f"needs {device}, not {problem.device}"


@pytest.fixture
def registry():
    made = Registry(frontend="moebius.test_frontend", operation="grouped_matmul")
    made.add(name="absent", load=lambda: "absent", needs=("moebius_no_such_package", "numpy"))
    made.add(name="named", load=lambda: "named", only_when_named=True)
    made.add(name="cuda", load=lambda: "cuda", supports=only("cuda"))
    made.add(name="plain", load=lambda: "plain", supports=only("cpu"))
    made.add(name="last", load=lambda: "last")
    return made


def complete(error):
    assert error.asked and error.found and error.do
    return error


@pytest.mark.parametrize(("problem", "name"), [(CPU, "plain"), (GPU, "cuda")], ids=["cpu", "cuda"])
def test_choose_none_takes_the_first_that_is_there_and_serves(registry, problem, name):
    assert registry.choose(None, problem).name == name


@pytest.mark.parametrize("name", ["named", "plain", "last"])
def test_choose_a_name_takes_it(registry, name):
    backend = registry.choose(name, CPU)
    assert backend.name == name and backend.operation == "grouped_matmul"
    assert registry.implementation(backend) == name


def test_choose_an_unknown_name_lists_the_known_ones(registry):
    with pytest.raises(ConfigError) as caught:
        registry.choose("other", CPU)
    error = complete(caught.value)
    assert "'other'" in error.asked and "moebius.test_frontend" in error.asked
    assert all(name in error.found for name in registry.names)


def test_choose_a_name_without_its_package_says_which(registry):
    with pytest.raises(BackendUnavailable) as caught:
        registry.choose("absent", CPU)
    error = complete(caught.value)
    assert "moebius_no_such_package" in error.found and "numpy" not in error.found


def test_choose_a_name_without_its_package_says_how_to_install_it(registry):
    registry.add(name="extra", load=lambda: None, needs=("moebius_no_such_package",), install="pip install extra")
    with pytest.raises(BackendUnavailable, match="do: pip install extra, or name another"):
        registry.choose("extra", CPU)


def fails(error):
    """A loader that raises, and the list of its calls."""
    calls = []

    def load():
        calls.append(error)
        raise error

    return load, calls


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError("libnccl.so.2: cannot open\nshared object"), "OSError: libnccl.so.2: cannot open shared object"),
        (RuntimeError("built for another torch"), "RuntimeError: built for another torch"),
        (BackendUnavailable("numpy 3", "numpy 2.4", "install 3"), "does not load: numpy 2.4"),
    ],
    ids=["OSError", "RuntimeError", "own"],
)
def test_choose_a_name_whose_package_does_not_load_gives_the_reason(registry, error, said):
    load, _ = fails(error)
    registry.add(name="broken", load=load, needs=("numpy",), install="pip install numpy")
    with pytest.raises(BackendUnavailable) as caught:
        registry.choose("broken", CPU)
    found = complete(caught.value)
    assert said in found.found and "pip install numpy" in found.do and "'broken'" in found.asked


def test_choose_none_passes_over_a_package_that_does_not_load():
    registry = Registry(frontend="moebius.test_frontend", operation="grouped_matmul")
    load, calls = fails(OSError("no library"))
    registry.add(name="broken", load=load, needs=("numpy",))
    registry.add(name="plain", load=lambda: "plain")
    assert registry.explain(CPU) == [("broken", "chosen"), ("plain", "available")] and not calls
    assert [registry.choose(None, CPU).name for _ in range(2)] == ["plain", "plain"]
    assert registry.explain(CPU) == [("broken", "does not load: OSError: no library"), ("plain", "chosen")]
    assert len(calls) == 1


def test_choose_a_backend_that_cannot_serve_loads_nothing(registry):
    load, calls = fails(OSError("no library"))
    registry.add(name="broken", load=load, needs=("numpy",), supports=only("cuda"))
    with pytest.raises(Unsupported, match="needs cuda, not cpu"):
        registry.choose("broken", CPU)
    assert not calls


def test_choose_a_name_that_cannot_serve_gives_its_reason_and_no_other_backend(registry):
    with pytest.raises(Unsupported) as caught:
        registry.choose("cuda", CPU)
    error = complete(caught.value)
    assert "needs cuda, not cpu" in error.found and str(CPU) in error.asked


def test_choose_none_where_nothing_serves_gives_every_reason():
    registry = Registry(frontend="moebius.test_frontend", operation="grouped_matmul")
    registry.add(name="absent", load=lambda: None, needs=("moebius_no_such_package",))
    registry.add(name="cuda", load=lambda: None, supports=only("cuda"))
    registry.add(name="named", load=lambda: None, only_when_named=True)
    with pytest.raises(Unsupported) as caught:
        registry.choose(None, CPU)
    found = complete(caught.value).found
    assert all(word in found for word in ("absent", "moebius_no_such_package", "cuda", "named: available when named"))


def test_names_are_in_declared_order(registry):
    assert registry.names == ("absent", "named", "cuda", "plain", "last")


def test_add_a_second_backend_of_a_name_is_refused(registry):
    with pytest.raises(ConfigError, match="'plain'"):
        registry.add(name="plain", load=lambda: None)


def test_implementation_is_loaded_once_and_at_first_use():
    loads = []
    registry = Registry(frontend="moebius.test_frontend", operation="dispatch")
    registry.add(name="one", load=lambda: loads.append(1) or object())
    backend = registry.choose("one", CPU)
    assert not loads
    assert registry.implementation(backend) is registry.implementation(backend)
    assert loads == [1]


def test_explain_gives_the_state_of_every_backend(registry):
    assert registry.explain(CPU) == [
        ("absent", "not installed: moebius_no_such_package"),
        ("named", "available when named"),
        ("cuda", "needs cuda, not cpu"),
        ("plain", "chosen"),
        ("last", "available"),
    ]


def test_explain_and_choose_agree(registry):
    for problem in (CPU, GPU):
        states = dict(registry.explain(problem))
        assert states[registry.choose(None, problem).name] == "chosen"
        assert list(states.values()).count("chosen") == 1


def test_problem_as_text_names_what_matters():
    assert str(GPU) == "bfloat16 on cuda, D=8, I=4, 2 experts"


def test_registries_do_not_share_rows(registry):
    other = Registry(frontend="moebius.other_frontend", operation="grouped_matmul")
    assert other.names == ()


# ------------------------------------------------------------------------------------------------- what was measured
def of_measured(*order, **rows):
    """A registry whose measurements know `order`, with "declared", "quick" and rows that only measurements choose."""
    asked = []

    def measured(problem, names):
        asked.append((problem, tuple(names)))
        return [name for name in order if name in names]

    made = Registry("moebius.test_frontend", "grouped_matmul", measured)
    for name, row in ({"declared": {}, "quick": {}, "own": {"when_measured": True}} | rows).items():
        made.add(name=name, load=lambda name=name: name, **row)
    return made, asked


def test_choose_none_takes_the_fastest_that_was_measured():
    registry, asked = of_measured("own", "quick")
    assert registry.choose(None, GPU).name == "own" and asked[0] == (GPU, ("declared", "quick", "own"))
    assert [row.name for row in registry.ranked(GPU)] == ["own", "quick", "declared"]
    assert registry.explain(GPU) == [("declared", "available"), ("quick", "available"), ("own", "chosen")]


def test_choose_none_where_nothing_was_measured_takes_the_first_declared():
    registry, _ = of_measured()
    assert registry.choose(None, GPU).name == "declared"
    assert registry.explain(GPU)[2] == ("own", "available when named")
    assert registry.choose("own", GPU).name == "own"


def test_choose_none_asks_the_measurements_only_of_those_that_serve():
    registry, asked = of_measured(
        "own", "quick", own={"when_measured": True, "supports": only("cpu")}, named={"only_when_named": True}
    )
    assert registry.choose(None, GPU).name == "quick" and asked[0][1] == ("declared", "quick")


def test_choose_a_name_is_not_replaced_by_what_was_faster():
    registry, _ = of_measured("own")
    assert registry.choose("declared", GPU).name == "declared"


def test_choose_none_where_the_fastest_does_not_load_takes_the_next():
    load, calls = fails(OSError("no library"))
    registry, _ = of_measured("own", "quick")
    registry.add(name="best", load=load, needs=("numpy",), when_measured=True)
    registry.measured = lambda problem, names: [name for name in ("best", "own") if name in names]
    assert registry.choose(None, GPU).name == "own" and len(calls) == 1


def test_ranked_and_explain_where_every_package_is_installed_know_what_is_not():
    registry, _ = of_measured("absent")
    registry.add(name="absent", load=lambda: None, needs=("moebius_no_such_package",), when_measured=True)
    assert registry.ranked(GPU)[0].name == "declared"
    assert registry.ranked(GPU, installed=False)[0].name == "absent"
    assert registry.explain(GPU, installed=False)[-1] == ("absent", "chosen")


def test_what_runs_on_one_device_is_no_default_where_a_problem_may_be_split():
    registry, _ = of_measured("own", own={"when_measured": True, "unsplit": True})
    split = replace(GPU, split=True)
    assert registry.choose(None, GPU).name == "own" and registry.choose(None, split).name == "declared"
    assert registry.choose("own", split).name == "own"
    assert dict(registry.explain(split))["own"].startswith("available when named")


def test_choose_for_a_layer_asks_for_both_products():
    layer = replace(GPU, up_width=6)
    assert layer.products == (replace(GPU, inter_dim=6), replace(GPU, dim=4, inter_dim=8))
    assert GPU.products == (GPU,) and layer.widths == (8, 4, 6)
    registry = Registry("moebius.test_frontend", "grouped_matmul")
    registry.add(name="no_4", load=lambda: None, supports=lambda problem: "not 4" if problem.dim == 4 else None)
    registry.add(name="no_6", load=lambda: None, supports=lambda problem: "not 6" if problem.inter_dim == 6 else None)
    registry.add(name="any", load=lambda: None)
    assert registry.choose(None, GPU).name == "no_4" and registry.choose(None, layer).name == "any"
    for name, reason in (("no_4", "not 4"), ("no_6", "not 6")):
        with pytest.raises(Unsupported, match=reason):
            registry.choose(name, layer)


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 8), ("relu2", 4)])
def test_of_layer_keeps_a_name_and_for_none_the_widths(activation, width):
    config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=4, expert_activation=activation)
    assert of_layer("loop", config) == "loop" and layer_of("loop") is None and layer_of(None) is None
    assert layer_of(of_layer(None, config)) == (1, 16, 4, width)
    up, down = (2, 16, width), (2, 4, 16)  # of 2 of the 4 experts
    assert sizes(of_layer(None, config, 0.5), down, None, 100) == (None, (2, 16, 4, width), 50)
    assert sizes("loop", up, down, 100) == ("loop", (2, 16, 4, width), 100)
    assert sizes(None, up, None, None) == (None, up, None)
