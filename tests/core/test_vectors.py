"""The golden vectors: they hold, they are written again byte for byte, and they tell right from wrong."""

import json
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moebius.core import ACTIVATIONS, ROUTING_RULES, activations, reference, tolerance, vectors

CASES = vectors.load()
of_kind = {kind: [case for case in CASES if case.kind == kind] for kind in ("experts", "gate", "moe")}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def cases(kind, condition=lambda case: True):
    chosen = [case for case in of_kind[kind] if condition(case)]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def swapped_halves(case):
    """The case with gate and up exchanged in the routed experts' first projection and its bias."""
    row, inputs = case.config.activation, dict(case.inputs)
    for name, value in case.inputs.items():
        if name.endswith(("gate_and_up_projs", "gate_up_proj_bias")):
            if row.interleaved:
                inputs[name] = np.stack([value[..., 1::2], value[..., 0::2]], axis=-1).reshape(value.shape)
            else:
                inputs[name] = np.concatenate(np.split(value, 2, axis=-1)[::-1], axis=-1)
    return replace(case, inputs=inputs)


# ------------------------------------------------------------------------------------------------------- the entries


@every_case
def test_compute_of_every_case_gives_the_stored_numbers(case):
    for name, worst in vectors.deviation(vectors.compute(case), case.outputs).items():
        assert worst <= vectors.TOLERANCE, name


@every_case
def test_compute_repeated_gives_the_same_and_leaves_its_inputs_alone(case):
    before = {name: value.copy() for name, value in case.inputs.items()}
    first, second = vectors.compute(case), vectors.compute(case)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    for name, value in case.inputs.items():
        np.testing.assert_array_equal(value, before[name])


@every_case
def test_outputs_of_every_case_hold_every_gradient(case):
    values = {"experts": {"y", "dweights"}, "gate": {"weights", "ids", "load", "aux_loss"}}
    values["moe"] = {"y", "ids", "load", "aux_loss"}
    losses = case.config.losses.keys() if case.kind != "experts" else set()
    assert case.outputs.keys() == values[case.kind] | losses | {"dx"} | {f"d{name}" for name in case.parameters}
    assert case.outputs["dx"].shape == case.inputs["x"].shape
    for name, value in case.parameters.items():
        assert case.outputs[f"d{name}"].shape == value.shape
    for name, value in case.outputs.items():
        assert np.isfinite(value).all() and value.any(), name
        assert value.dtype == (np.int64 if name in ("ids", "load") else np.float64)


@every_case
def test_compute_with_noise_stays_in_bounds_and_keeps_the_chosen_experts(case):
    """What a frontend's test does: bounds from the noise, routing as stored."""
    exact = {name: value.astype(np.float64) for name, value in case.outputs.items()}
    limits = tolerance.bounds(lambda arithmetic: vectors.compute(case, arithmetic), exact, "float32", samples=2)
    assert all(0 < limit.norm < 1e-3 * limit.scale for name, limit in limits.items() if name not in ("ids", "load"))
    assert all(limits[name].norm == 0 for name in ("ids", "load") if name in limits)


# ---------------------------------------------------------------------------------------------------------- the file


def test_write_over_the_file_gives_the_same_bytes(tmp_path):
    copy = tmp_path / "vectors.json"
    shutil.copy(vectors.FILE, copy)
    vectors.write(copy)
    assert copy.read_bytes() == vectors.FILE.read_bytes()


def test_write_from_nothing_gives_the_same_cases_and_numbers(tmp_path):
    """Another processor may move the last stored digit of a number; nothing else."""
    vectors.write(tmp_path / "new.json")
    new, old = json.loads((tmp_path / "new.json").read_text()), json.loads(vectors.FILE.read_text())
    assert (new["about"], new["arrays"]) == (old["about"], old["arrays"])
    for entry, before in zip(new["cases"], old["cases"], strict=True):
        assert {**entry, "outputs": None} == {**before, "outputs": None}
        assert isinstance(entry["outputs"], str) == isinstance(before["outputs"], str)
    for case, before in zip(vectors.load(tmp_path / "new.json"), CASES, strict=True):
        assert max(vectors.deviation(case.outputs, before.outputs).values()) <= vectors.TOLERANCE


def test_write_over_a_number_that_moved_mends_it(tmp_path):
    document = json.loads(vectors.FILE.read_text())
    document["cases"][0]["outputs"]["y"][0][0] *= 1 + 1e-10
    copy = tmp_path / "vectors.json"
    copy.write_text(json.dumps(document))
    vectors.write(copy)
    assert copy.read_bytes() == vectors.FILE.read_bytes()


def test_file_is_small_and_has_twelve_digits():
    assert vectors.FILE.stat().st_size < 400_000
    for case in CASES:
        for value in case.outputs.values():
            assert all(number == float(f"{number:.12g}") for number in value.ravel())


def test_main_without_write_prints_the_largest_deviation(capsys):
    assert vectors.main([]) == 0
    assert f"{len(CASES)} cases, largest deviation" in capsys.readouterr().out


def test_main_with_a_number_that_moved_returns_one(tmp_path, monkeypatch, capsys):
    document = json.loads(vectors.FILE.read_text())
    document["cases"][0]["outputs"]["y"][0][0] *= 1 + 1e-10
    monkeypatch.setattr(vectors, "FILE", tmp_path / "vectors.json")
    monkeypatch.setattr(vectors, "load", lambda file=vectors.FILE, load=vectors.load: load(file))
    vectors.FILE.write_text(json.dumps(document))
    assert vectors.main([]) == 1
    assert "experts-swiglu: y" in capsys.readouterr().out


def test_main_with_a_case_that_is_not_declared_returns_one(tmp_path, monkeypatch, capsys):
    document = json.loads(vectors.FILE.read_text())
    document["cases"][0]["config"]["expert_bias"] = True
    monkeypatch.setattr(vectors, "FILE", tmp_path / "vectors.json")
    vectors.FILE.write_text(json.dumps(document))
    assert vectors.main([]) == 1
    assert "--write" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "stored", "worst"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0 + 1e-9, 2.0], [1.0, 2.0], 1e-9),
        ([1e-9, 2.0], [0.0, 2.0], 5e-7),  # relative to a thousandth of the largest
        ([1e-300], [0.0], np.inf),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([1], [2], np.inf),
    ],
)
def test_deviation_of_a_value_is_relative(value, stored, worst):
    found = vectors.deviation({"y": np.array(value)}, {"y": np.array(stored)})
    assert found == {"y": pytest.approx(worst, rel=1e-6)}


def test_deviation_of_a_missing_output_is_infinite():
    assert vectors.deviation({"y": np.ones(1)}, {"dx": np.ones(1)}) == {"y": np.inf, "dx": np.inf}


# -------------------------------------------------------------------------------------------------------- the inputs


@every_case
def test_inputs_of_every_case_are_exact_in_every_dtype(case):
    for name, value in case.inputs.items():
        if value.dtype != np.float64:
            continue
        assert (value * 32 == np.round(value * 32)).all(), f"{name} is no dyadic rational"
        assert (value.astype(np.float16) == value).all(), name
        assert exact_in_bfloat16(value), name


@cases("experts")
def test_preactivations_of_the_experts_are_exact_in_every_dtype(case):
    hidden_RU = trace(case).hidden_RU
    assert exact_in_bfloat16(hidden_RU)
    assert (hidden_RU.astype(np.float16) == hidden_RU).all()


@pytest.mark.parametrize("case", [*of_kind["gate"], *of_kind["moe"]], ids=lambda case: case.name)
def test_logits_of_every_gate_are_exact_and_choose_by_a_margin(case):
    """The chosen experts are the same in every dtype: equal logits are equal, others differ by far more than
    float32 rounds."""
    prefix = "" if case.kind == "gate" else "gate."
    parameters = {name[len(prefix) :]: value for name, value in case.inputs.items() if name.startswith(prefix)}
    x_TD, bias_E = case.inputs["x"].reshape(-1, case.config.dim), case.inputs.get("correction_bias")
    logits_TE, routing = reference.gate(x_TD, parameters, case.config, correction_bias_E=bias_E)
    assert exact_in_bfloat16(logits_TE)
    for scale, shift in product((1 - 1e-4, 1 + 1e-4), repeat=2):
        moved = reference.route(
            logits_TE * scale, case.config, correction_bias_E=None if bias_E is None else bias_E * shift
        )
        np.testing.assert_array_equal(moved.ids_TK, routing.ids_TK)


def exact_in_bfloat16(value):
    """Whether the lower half of every float32 is empty."""
    short = value.astype(np.float32)
    return (short == value).all() and not (short.view(np.uint32) & 0xFFFF).any()


def test_recipe_of_the_file_gives_the_inputs():
    """The words in the file, followed by hand."""
    document = json.loads(vectors.FILE.read_text())
    for entry, case in zip(document["cases"], CASES, strict=True):
        for name, key in entry["inputs"].items():
            how = document["arrays"][key]
            if "values" in how:
                assert case.inputs[name].tolist() == how["values"]
                continue
            s, numbers = how["seed"], []
            while len(numbers) < np.prod(how["shape"]):
                s = (48271 * s) % (2**31 - 1)
                numbers.append((how["low"] + s % how["span"]) / how["over"])
            assert case.inputs[name].ravel().tolist() == numbers
            assert case.inputs[name].shape == tuple(how["shape"])


def test_load_twice_gives_arrays_of_their_own():
    first, second = vectors.load()[0], vectors.load()[1]
    first.inputs["x"][:] = 0
    assert second.inputs["x"].any()


# ------------------------------------------------------------------------------------------------- what they exercise


def trace(case):
    given = case.inputs
    return reference.experts(
        given["x"], given["token_mask"], given["weights"], given["ids"], case.parameters, case.config
    )


def test_cases_cover_every_row_and_setting():
    found = {
        (c.config.activation.name, c.config.expert_bias, c.config.apply_router_weight_after_down)
        for c in of_kind["experts"]
    }
    assert found >= set(product(ACTIVATIONS, (False, True), (False, True)))
    found = {
        (
            c.config.routing_rule.name,
            c.config.norm_topk_prob,
            c.config.has_correction_bias,
            c.config.n_expert_groups > 1,
        )
        for c in of_kind["gate"]
    }
    assert found >= set(product(ROUTING_RULES, (False, True), (False, True), (False, True)))
    layers = [case.config for case in of_kind["moe"]]
    assert {bool(c.n_shared_experts) + c.shared_expert_gate for c in layers} == {0, 1, 2}
    assert {c.shared_expert_activation for c in layers if c.n_shared_experts} == {"swiglu", "relu2"}
    assert any(c.moe_latent_size for c in layers) and any(len(c.losses) == 3 for c in layers)
    found = {c.config.routing_rule.name for c in of_kind["gate"] if len(c.config.losses) == 3}
    assert found == ROUTING_RULES.keys()
    assert any(case.inputs["padding_mask"].any() for case in of_kind["moe"])


@cases("experts")
def test_routing_of_the_experts_holds_every_oddity(case):
    ids_TK, mask_T, n = case.inputs["ids"], case.inputs["token_mask"], case.config.n_routed_experts
    assert not mask_T.all()
    assert (ids_TK == -1).any() and (ids_TK == n).any() and (ids_TK > n).any() and (ids_TK < -1).any()
    assert any(len(set(row)) < len(row) and 0 <= row[0] < n for row in ids_TK.tolist())
    empty = set(range(n)) - set(ids_TK[mask_T].ravel().tolist())
    assert empty and empty & set(ids_TK[~mask_T].ravel().tolist())
    routes_TK = mask_T[:, None] & (ids_TK >= 0) & (ids_TK < n)
    assert (case.inputs["weights"][routes_TK] == 0).any() and (case.inputs["weights"][routes_TK] < 0).any()
    routed_T = routes_TK.any(-1)
    assert not case.outputs["y"][~routed_T].any() and not case.outputs["dx"][~routed_T].any()
    for expert, name in product(empty, case.parameters):
        assert not case.outputs[f"d{name}"][expert].any()


@cases("experts", lambda case: case.config.activation.limit is not None)
def test_clamped_experts_have_preactivations_on_both_sides_of_the_limits_and_none_on_them(case):
    row, hidden_RU = case.config.activation, trace(case).hidden_RU
    half = hidden_RU.shape[-1] // 2
    gate_RI, up_RI = (
        (hidden_RU[:, 0::2], hidden_RU[:, 1::2]) if row.interleaved else (hidden_RU[:, :half], hidden_RU[:, half:])
    )
    for values in (gate_RI, up_RI):
        assert (values > row.limit).any() and (values < -row.limit).any()
        assert (abs(values) < row.limit).any() or row.limit == 0
        assert abs(abs(values) - row.limit).min() > 0.01


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.kind != "gate" and case.config.activation.gated],
    ids=lambda case: case.name,
)
def test_swapped_gate_and_up_change_every_output_by_much(case):
    found = vectors.compute(swapped_halves(case))
    part = "" if case.kind == "experts" else "experts."
    for name in ("y", "dx", f"d{part}down_projs"):
        assert tolerance.relative_error(found[name], case.outputs[name]) > 0.05, name


@cases("moe", lambda case: case.config.n_shared_experts and case.config.shared_expert_activation == "swiglu")
def test_swapped_shared_projections_change_the_output_by_much(case):
    inputs, prefix = dict(case.inputs), "shared_experts."
    for name in inputs:
        if name.startswith(f"{prefix}gate_proj"):
            other = name.replace("gate_proj", "up_proj")
            inputs[name], inputs[other] = inputs[other], inputs[name]
    found = vectors.compute(replace(case, inputs=inputs))
    assert tolerance.relative_error(found["y"], case.outputs["y"]) > 0.05


@cases("experts", lambda case: case.config.activation.gated)
def test_halves_read_in_the_other_layout_change_the_output_by_much(case):
    row = case.config.activation
    other = replace(row, interleaved=not row.interleaved)
    given, hidden_RU = trace(case), trace(case).hidden_RU
    right = reference.activate(hidden_RU, given.permuted.row_weights_R, row)
    wrong = reference.activate(hidden_RU, given.permuted.row_weights_R, other)
    assert tolerance.relative_error(wrong, right) > 0.05


def test_every_routing_rule_gives_numbers_of_its_own():
    """Each rule differs from each other one in some setting, so that none can stand in for another."""
    by_rule = {
        name: [case.outputs for case in of_kind["gate"] if case.config.routing_rule.name == name]
        for name in ROUTING_RULES
    }
    for one, other in product(by_rule, repeat=2):
        if one != other:
            pairs = zip(by_rule[one], by_rule[other], strict=True)
            assert any(max(vectors.deviation(a, b).values()) > 1e-3 for a, b in pairs), (one, other)


def test_gate_cases_hold_ties_at_the_last_place():
    """Some choice is made between equal logits, so that an order of its own shows."""
    ties = 0
    for case in of_kind["gate"]:
        if case.config.has_correction_bias or case.config.n_expert_groups > 1:
            continue
        logits_TE, _ = reference.gate(case.inputs["x"], case.parameters, case.config)
        k = case.config.n_activated_experts
        ranked_TE = np.sort(logits_TE, axis=-1)[:, ::-1]
        ties += int((ranked_TE[:, k - 1] == ranked_TE[:, k]).sum()) if k < ranked_TE.shape[1] else 0
    assert ties


def test_activation_of_every_gated_row_is_asymmetric():
    rng = np.random.default_rng(0)
    for row in activations.ACTIVATIONS.values():
        if row.gated:
            hidden_RU = rng.normal(size=(8, 16))
            swapped_RU = np.concatenate(np.split(hidden_RU, 2, axis=-1)[::-1], axis=-1)
            if row.interleaved:
                swapped_RU = np.stack([hidden_RU[:, 1::2], hidden_RU[:, 0::2]], axis=-1).reshape(hidden_RU.shape)
            right = reference.activate(hidden_RU, None, row)
            assert tolerance.relative_error(reference.activate(swapped_RU, None, row), right) > 0.05
