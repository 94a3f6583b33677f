"""The reference against what the original computes: 24 cases of the experts, 24 of the gate, and one permutation.

The original ran in float32 and its results were stored with 7 decimals, so they are compared within 1e-6 absolute plus
1e-6 of the tensor's largest element. Taken element by element the same 1e-6 holds for all but one number: an element of
y of relu2 with biases is off by 5.8e-6, in a sum whose terms are near 40 and of both signs, by float32 rounding there.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from moebius.core import MoEConfig, MoEWarning, layout, reference

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_vectors.json").read_text())
EXPERTS, GATE, PERMUTE = PUBLISHED["experts"], PUBLISHED["gate"], PUBLISHED["permute"]


def name_of(case):
    settings = case["config"] | {"correction_bias": case["correction_bias"]} if "ids" in case else case["config"]
    return "-".join(key if value is True else str(value) for key, value in settings.items() if value is not False)


def filled(shape, scale, seed, offset):
    n = np.arange(np.prod(shape))
    return (offset + scale * np.sin(seed + 1.37 * n)).astype(np.float32).astype(np.float64).reshape(shape)


def close(value, published):
    published = np.reshape(published, np.shape(value))
    return np.abs(value - published).max() <= 1e-6 + 1e-6 * np.abs(published).max()


def close_in_sum(gradient, published):
    """A sum that cancels carries the rounding of all its terms."""
    return abs(gradient.sum() - published) <= 1e-6 + 1e-6 * np.linalg.norm(gradient) * np.sqrt(gradient.size)


@pytest.mark.parametrize("case", EXPERTS["cases"], ids=name_of)
def test_experts_of_the_original_give_the_published_numbers(case):
    config = MoEConfig(**EXPERTS["config"], **case["config"], dtype="float32")
    mask_T, ids_TK = np.array(EXPERTS["token_mask"]), np.array(EXPERTS["ids"])
    shapes = {"x": (len(mask_T), config.dim), "weights": ids_TK.shape, "dy": (len(mask_T), config.dim)}
    shapes |= {row.name: row.shape for row in layout.experts(config)}
    given = {name: filled(shape, **EXPERTS["recipes"][name]) for name, shape in shapes.items()}

    trace = reference.experts(given["x"], mask_T, given["weights"], ids_TK, given, config)
    dx_TD, dweights_TK, grads = reference.experts_vjp(trace, given, config, given["dy"])

    for name, value in {"y": trace.y_TD, "dx": dx_TD, "dweights": dweights_TK}.items():
        assert close(value, case[name]), name
    assert grads.keys() == case["norms"].keys() == case["sums"].keys()
    for name, gradient in grads.items():
        assert close(np.linalg.norm(gradient), case["norms"][name]), name
        assert close_in_sum(gradient, case["sums"][name]), name


@pytest.mark.parametrize("case", GATE["cases"], ids=name_of)
def test_gate_of_the_original_gives_the_published_numbers(case):
    with warnings.catch_warnings():  # the original was run with groups under every score function
        warnings.simplefilter("ignore", MoEWarning)
        config = MoEConfig(**GATE["config"], **case["config"], dtype="float32")
    n, k, mask_T = config.n_routed_experts, config.n_activated_experts, np.array(GATE["token_mask"])
    shapes = {"x": (len(mask_T), config.dim), "weight": (n, config.dim), "correction_bias": (n,)}
    given = {name: filled(shape, **GATE["recipes"][name]) for name, shape in shapes.items()}
    bias_E = given["correction_bias"] if case["correction_bias"] else None
    logits_TE, routing = reference.gate(given["x"], given, config, correction_bias_E=bias_E)
    load_E = reference.expert_load(routing.ids_TK, mask_T, n)

    # The original leaves the order of the chosen experts open (sigmoid_with_bias): its weights, and the gradient
    # that came in for them, are brought into our order first.
    ids_TK = np.array(case["ids"])
    order_TK = np.argsort(ids_TK, axis=-1)[np.arange(len(ids_TK))[:, None], _ranks(routing.ids_TK)]
    assert (np.take_along_axis(ids_TK, order_TK, axis=-1) == routing.ids_TK).all()
    weights_TK = np.reshape(case["weights"], ids_TK.shape)
    assert close(routing.weights_TK, np.take_along_axis(weights_TK, order_TK, axis=-1))
    assert close(reference.aux_loss(routing.scores_TE, load_E, mask_T, k), case["aux_loss"])

    dweights_TK = np.take_along_axis(filled(ids_TK.shape, **GATE["recipes"]["dweights"]), order_TK, axis=-1)
    dscores_TE = reference.aux_loss_vjp(routing.scores_TE, load_E, mask_T, k, config.aux_loss_coeff)
    dx_TD, grads = reference.gate_vjp(
        given["x"], logits_TE, routing.ids_TK, given, config, dweights_TK, dscores_TE, correction_bias_E=bias_E
    )
    assert close(np.linalg.norm(grads["weight"]), case["norms"]["weight"])
    assert close(np.linalg.norm(dx_TD), case["norms"]["x"])


def _ranks(ids_TK):
    """Place of each id among its row's ids in ascending order."""
    return np.argsort(np.argsort(ids_TK, axis=-1), axis=-1)


def test_permute_of_the_original_gives_the_published_rows():
    ids_TK, mask_T = np.array(EXPERTS["ids"]), np.array(EXPERTS["token_mask"])
    weights_TK = filled(ids_TK.shape, **EXPERTS["recipes"]["weights"])
    x_TD = filled((len(mask_T), 8), **EXPERTS["recipes"]["x"])
    rows = reference.permute(x_TD, weights_TK, ids_TK - PERMUTE["first_expert"], mask_T, PERMUTE["n_experts"])
    assert rows.tokens_R.tolist() == PERMUTE["tokens"]
    assert (rows.tokens_R * ids_TK.shape[1] + rows.slots_R).tolist() == PERMUTE["slots"]
    assert rows.group_sizes_e.tolist() == PERMUTE["sizes"]
    assert rows.group_sizes_e.cumsum().tolist() == PERMUTE["ends"]
    assert close(rows.row_weights_R, PERMUTE["weights"])
    assert (rows.rows_RD == x_TD[PERMUTE["tokens"]]).all()


def test_published_file_holds_every_case():
    assert len(EXPERTS["cases"]) == len({name_of(case) for case in EXPERTS["cases"]}) == 24
    assert len(GATE["cases"]) == len({name_of(case) for case in GATE["cases"]}) == 24
