"""Names, axes and shapes of every parameter."""

import pytest

from moebius.core import MoEConfig, layout


def config(**settings):
    return MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=6, moe_inter_dim=5, **settings)


def shapes(rows):
    return {row.name: row.shape for row in rows}


def test_experts_of_a_gated_activation_hold_both_halves_in_one_matrix():
    assert shapes(layout.experts(config())) == {"gate_and_up_projs": (4, 6, 10), "down_projs": (4, 5, 6)}


def test_experts_of_an_activation_without_gate_keep_the_name_at_half_the_width():
    rows = shapes(layout.experts(config(expert_activation="relu2", expert_bias=True)))
    assert rows["gate_and_up_projs"] == (4, 6, 5) and rows["gate_up_proj_bias"] == (4, 5)


def test_experts_with_bias_have_two_more_that_start_at_zero():
    rows = layout.experts(config(expert_bias=True))
    assert shapes(rows[2:]) == {"gate_up_proj_bias": (4, 10), "down_proj_bias": (4, 6)}
    assert [row.zeros for row in rows] == [False, False, True, True]


def test_experts_with_latent_projection_work_in_its_width():
    rows = shapes(layout.experts(config(moe_latent_size=3)))
    assert rows == {"gate_and_up_projs": (4, 3, 10), "down_projs": (4, 5, 3)}


def test_gate_reads_the_full_width_in_its_own_dtype():
    rows = layout.gate(config(moe_latent_size=3, router_bias=True, dtype="bfloat16", gate_dtype="float32"))
    assert shapes(rows) == {"weight": (4, 6), "bias": (4,)}
    assert {row.dtype for row in rows} == {"float32"}
    assert layout.gate(config(dtype="float16"))[0].dtype == "float16"


def test_shared_experts_without_any_have_no_parameter():
    assert layout.shared_experts(config(shared_expert_gate=True)) == ()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_shared_experts_are_one_mlp_of_their_summed_width(activation, bias):
    rows = shapes(
        layout.shared_experts(
            config(n_shared_experts=2, shared_expert_inter_dim=7, shared_expert_activation=activation, expert_bias=bias)
        )
    )
    expected = {"up_proj.weight": (14, 6), "down_proj.weight": (6, 14)}
    expected |= {"gate_proj.weight": (14, 6)} if activation == "swiglu" else {}
    expected |= {name.replace("weight", "bias"): shape[:1] for name, shape in expected.items()} if bias else {}
    assert rows == expected


def test_moe_with_everything_has_the_dotted_names_of_checkpoints():
    rows = layout.moe(
        config(
            n_shared_experts=1,
            shared_expert_gate=True,
            moe_latent_size=3,
            expert_bias=True,
            router_bias=True,
        )
    )
    assert shapes(rows) == {
        "gate.weight": (4, 6),
        "gate.bias": (4,),
        "experts.gate_and_up_projs": (4, 3, 10),
        "experts.down_projs": (4, 5, 3),
        "experts.gate_up_proj_bias": (4, 10),
        "experts.down_proj_bias": (4, 3),
        "shared_experts.gate_proj.weight": (5, 6),
        "shared_experts.gate_proj.bias": (5,),
        "shared_experts.up_proj.weight": (5, 6),
        "shared_experts.up_proj.bias": (5,),
        "shared_experts.down_proj.weight": (6, 5),
        "shared_experts.down_proj.bias": (6,),
        "shared_expert_gate.weight": (1, 6),
        "fc1_latent_proj.weight": (3, 6),
        "fc1_latent_proj.bias": (3,),
        "fc2_latent_proj.weight": (6, 3),
        "fc2_latent_proj.bias": (6,),
    }
    assert all(row.zeros == row.name.endswith("bias") for row in rows)


def test_moe_without_options_has_a_gate_and_experts_alone():
    assert list(shapes(layout.moe(config()))) == ["gate.weight", "experts.gate_and_up_projs", "experts.down_projs"]


def test_moe_without_shared_experts_has_no_gate_on_them():
    assert "shared_expert_gate.weight" not in shapes(layout.moe(config(shared_expert_gate=True)))


def test_parameter_axes_name_every_size():
    for row in layout.moe(config(n_shared_experts=1, shared_expert_gate=True, moe_latent_size=3, expert_bias=True)):
        assert len(row.axes) == len(row.shape)


def test_state_is_the_correction_bias_in_float32_where_the_config_holds_one():
    (row,) = layout.state(config(score_func="sigmoid", force_e_score_correction_bias=True, gate_dtype="float16"))
    assert (row.name, row.axes, row.shape) == ("gate.e_score_correction_bias", ("E",), (4,))
    assert (row.dtype, row.zeros) == ("float32", True)
    assert layout.state(config(score_func="sigmoid")) == ()
