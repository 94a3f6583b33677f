"""Every name of the documented module is there, with the documented signature."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from moebius.torch_frontend import automodel

PAGE = json.loads((Path(__file__).parents[1] / "data" / "automodel_api.json").read_text())
METHODS = [(cls, name) for cls, row in PAGE["classes"].items() for name in row["methods"]]
# Beyond the page, and never noticed by a caller of it: a keyword of later revisions, and a default where it has none.
KEYWORDS = {"_permute_tokens_for_grouped_mm": {"return_slot_ids": False}}
DEFAULTS = {"init_weights": {"buffer_device": None}}


def text(function, name: str = "", bound: bool = False) -> str:
    """The signature as the page has it: names, order, kinds and defaults, no annotations."""
    found, rows = inspect.signature(function), []
    for row in list(found.parameters.values())[bound:]:
        default = row.default
        if row.kind == row.KEYWORD_ONLY and (row.name, default) in KEYWORDS.get(name, {}).items():
            continue
        if (row.name, default) in DEFAULTS.get(name, {}).items():
            default = row.empty
        rows.append(row.replace(annotation=row.empty, default=default))
    return str(found.replace(parameters=rows, return_annotation=inspect.Signature.empty))


def test_module_exports_every_documented_name() -> None:
    names = {*PAGE["classes"], *PAGE["functions"]}
    assert len(names) == 14 and names <= set(automodel.__all__)
    assert all(hasattr(automodel, name) for name in automodel.__all__)


@pytest.mark.parametrize("name", PAGE["functions"])
def test_functions_have_the_documented_signature(name: str) -> None:
    assert text(getattr(automodel, name), name) == PAGE["functions"][name]


@pytest.mark.parametrize("name", [name for name, row in PAGE["classes"].items() if row["constructor"]])
def test_classes_have_the_documented_constructor(name: str) -> None:
    assert text(getattr(automodel, name).__init__, bound=True) == PAGE["classes"][name]["constructor"]


@pytest.mark.parametrize(("cls", "name"), METHODS)
def test_methods_have_the_documented_signature(cls: str, name: str) -> None:
    wanted = PAGE["classes"][cls]["methods"][name]
    method = inspect.getattr_static(getattr(automodel, cls), name)
    assert isinstance(method, staticmethod) == wanted["static"]
    assert text(getattr(method, "__func__", method), name, bound=not wanted["static"]) == wanted["signature"]


def test_signatures_that_differ_would_be_seen() -> None:
    def limit(x, permuted_probs, *, limit: float) -> None: ...

    def default(x, permuted_probs, limit: float = 7.0) -> None: ...

    def order(permuted_probs, x, limit: float) -> None: ...

    wanted = PAGE["functions"]["swiglu_clamped_deepep"]
    assert wanted not in (text(limit), text(default), text(order))
