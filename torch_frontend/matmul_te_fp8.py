"""Backend "te" inside Transformer Engine's autocast: the same three grouped GEMMs on quantised operands.

Rows and matrices are quantised expert by expert with the recipe's own quantizers and freed with the GEMM; nothing
quantised is kept for the backward pass, which quantises what it needs again. `GroupedLinear` itself would not do: it
takes output-major matrices as parameters of a module, copies them to lay them out, and keeps its operands.

An FP8 GEMM wants a multiple of 16 rows an expert: `prepare` says where each row goes among rows of zeros.
Source: module/grouped_linear.py and quantization.py of Transformer Engine 2.20.2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.core.errors import Unsupported
from moebius.torch_frontend import matmul_te
from moebius.torch_frontend.matmul_te import Splits

_QUANTIZATION = "transformer_engine.pytorch.quantization"
_DO = "te.autocast(recipe=Float8CurrentScaling()) or Float8BlockScaling(), or another backend"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a kind of recipe asks.

    Attributes:
        multiple: of rows an expert, and of both widths.
        capability: least CUDA compute capability.
        against: why this backend does not serve it; None where it does.
    """

    multiple: int = 16
    capability: tuple[int, int] = (8, 9)
    against: str | None = None


# Method of a recipe that says of which kind it is -> what that asks. Multiples: get_align_size_for_quantization, and
# the leading dimensions that cuBLAS takes; capabilities: is_fp8_available and its siblings.
RULES = {
    "float8_current_scaling": Rule(),
    "float8_block_scaling": Rule(capability=(9, 0)),
    "mxfp8": Rule(multiple=32, capability=(10, 0)),
    "delayed": Rule(against="it keeps a history of maxima in each module, and a function of tensors has none"),
    "nvfp4": Rule(against="4-bit experts are not in this version"),
    "custom": Rule(against="its quantizers may differ from operand to operand"),
}
_UNKNOWN = Rule(against="it is of a kind that this version does not know")
# Operand -> (pass whose format it takes, the recipe's attribute with its scaling).
OPERANDS = {
    "input": ("forward", "fp8_quant_fwd_inp"),
    "weight": ("forward", "fp8_quant_fwd_weight"),
    "grad_output": ("backward", "fp8_quant_bwd_grad"),
}
# GEMM -> whether it adds partial sums in float32 proper where the recipe does not say.
ACCURATE = {"fprop": False, "dgrad": True, "wgrad": True}

_recipes: dict[str, Any] = {}


class Padded(NamedTuple):
    """Which rows are whose, and where they go.

    Attributes:
        splits: as they came. sizes: of the experts with rows, padded.
        places_N: row among the padded ones of each of the N rows before the end; None where none is padded.
        recipe: to quantise with.
    """

    splits: Splits
    sizes: list[int]
    places_N: Tensor | None
    recipe: Any

    @property
    def rule(self) -> Rule:
        """What the recipe asks."""
        return rule_of(self.recipe)


def asked() -> str:
    """Key of the recipe of the autocast around the caller, for `recipe_of`; "" outside, or without the package.

    The forward pass asks, and hands the key on to the backward pass, which runs outside the autocast.
    """
    module = sys.modules.get(_QUANTIZATION)  # an autocast is open only where this is loaded
    if module is None or not module.FP8GlobalStateManager.is_fp8_enabled():
        return ""
    recipe = module.FP8GlobalStateManager.get_fp8_recipe()
    key = str(recipe)
    _recipes[key] = recipe
    return key


def recipe_of(key: str) -> Any:
    """The recipe that `asked` saw."""
    return _recipes[key]


def rule_of(recipe: Any) -> Rule:
    """What a recipe asks."""
    return next((rule for kind, rule in RULES.items() if getattr(recipe, kind)()), _UNKNOWN)


def prepare(group_sizes: Tensor, recipe: Any) -> Padded:
    """One copy to the host, which waits for the device; see Kernels.prepare."""
    splits, multiple = matmul_te.prepare(group_sizes), rule_of(recipe).multiple
    sizes = [-(-size // multiple) * multiple for size in splits.sizes]
    places_N = None if sizes == splits.sizes else _places(splits.sizes, sizes, group_sizes.device)
    return Padded(splits, sizes, places_N, recipe)


def product(rows: Tensor, weight: Tensor, padded: Padded) -> Tensor:
    """[R, F]; see Kernels.product. A weight that is a transposed view asks for the input gradient."""
    matrices, layout = matmul_te.as_stored(weight)
    gradient = layout == "TN"
    if gradient and padded.recipe.backward_override == "high_precision":
        return matmul_te.product(rows, weight, padded.splits)
    check(padded.recipe, rows, weight)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    if not padded.sizes:
        return out
    experts = matmul_te.select(matrices, padded.splits.experts)
    a = _quantise(experts, padded.recipe, "weight", columnwise=layout == "NN")
    b = _quantise(_parts(rows, padded), padded.recipe, "grad_output" if gradient else "input", columnwise=False)
    out_padded = out if padded.places_N is None else rows.new_empty(sum(padded.sizes), weight.shape[2])
    accurate = _accurate(padded.recipe, "dgrad" if gradient else "fprop")
    matmul_te.gemm(a, b, [out_padded], layout, padded.sizes, accurate)
    if padded.places_N is not None:
        torch.index_select(out_padded, 0, padded.places_N, out=out[: padded.places_N.shape[0]])
    return out


def weight_gradient(rows: Tensor, dout: Tensor, padded: Padded) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    if padded.recipe.backward_override == "high_precision":
        return matmul_te.weight_gradient(rows, dout, padded.splits)
    dweight, out = matmul_te.empty_gradient(rows, dout, padded.splits)
    if out:
        a = _quantise(_parts(dout, padded), padded.recipe, "grad_output", columnwise=True)
        b = _quantise(_parts(rows, padded), padded.recipe, "input", columnwise=True)
        matmul_te.gemm(a, b, out, "NT", padded.sizes, _accurate(padded.recipe, "wgrad"))
    return dweight


def check(recipe: Any, rows: Tensor, weight: Tensor) -> None:
    """The recipe can serve these tensors.

    Raises:
        Unsupported: it cannot; says why.
    """
    rule, name = rule_of(recipe), type(recipe).__name__
    capability = torch.cuda.get_device_capability(rows.device)
    against = rule.against
    if against is None and capability < rule.capability:
        here, least = (".".join(map(str, pair)) for pair in (capability, rule.capability))
        against = f"this GPU of compute capability {here}; it needs {least}"
    if against is None and any(width % rule.multiple for width in weight.shape[1:]):
        against = f"matrices [{weight.shape[1]}, {weight.shape[2]}]; it takes multiples of {rule.multiple}"
    if against is None and recipe.backward_override == "dequantized":
        against = "backward_override='dequantized', which asks for the forward pass's quantised operands to be kept"
    if against is not None:
        raise Unsupported(f"grouped_matmul backend 'te' with the recipe {name}", against, _DO)


def _places(sizes: list[int], padded: list[int], device: torch.device) -> Tensor:
    """Of each row its number plus the padding before its expert."""
    before = [0, *accumulate(large - size for size, large in zip(sizes, padded, strict=True))][:-1]
    counts, shifts = torch.tensor([sizes, before], device=device)
    total = sum(sizes)
    return torch.arange(total, device=device) + shifts.repeat_interleave(counts, output_size=total)


def _parts(rows: Tensor, padded: Padded) -> list[Tensor]:
    """Each expert's rows, padded with zeros, which have no part in any product."""
    if padded.places_N is not None:
        wide = rows.new_zeros(sum(padded.sizes), rows.shape[1])
        rows = wide.index_copy_(0, padded.places_N, rows[: padded.places_N.shape[0]])
    return matmul_te.split_rows(rows, padded.sizes)


def _quantise(tensors: list[Tensor], recipe: Any, operand: str, *, columnwise: bool) -> list[Any]:
    """Each tensor by a scale, or by scales, of its own.

    Args:
        columnwise: for a GEMM that contracts over rows of the tensor: "N" as operand A, "T" as operand B.
    """
    from transformer_engine.pytorch.quantization import QuantizerRole, RecipeState

    mode, params = OPERANDS[operand]
    roles = [QuantizerRole(module_type="grouped_linear", tensor_type=operand)]
    state = RecipeState.create(recipe, mode=mode, num_quantizers=1, device=tensors[0].device, roles=roles)
    (quantizer,) = state.make_quantizers()
    quantizer.internal = True  # storage for a GEMM, no tensor that autograd could meet
    if recipe.float8_current_scaling():  # the state leaves these two to the module
        quantizer.force_pow_2_scales = getattr(recipe, params).power_2_scale
        quantizer.amax_epsilon = getattr(recipe, params).amax_epsilon
    # With one scale a tensor the kernels write transposed data only beside the plain; TE's modules ask so for weights.
    beside = recipe.float8_current_scaling() or operand == "weight"
    quantizer.set_usage(rowwise=beside or not columnwise, columnwise=columnwise)
    return [quantizer(tensor) for tensor in tensors]


def _accurate(recipe: Any, gemm: str) -> bool:
    params = getattr(recipe, f"fp8_gemm_{gemm}", None)
    return ACCURATE[gemm] if params is None else bool(params.use_split_accumulator)
