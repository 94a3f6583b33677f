"""State dicts: a module takes the whole of one or, where something does not fit, nothing of it.

torch copies what fits before it says what does not, and so leaves a module half loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import is_tensor_like

from moebius.core.errors import StateDictError
from moebius.torch_frontend.sharding import matching

_ASSIGN = "assign_to_params_buffers"  # torch's name for it, in the metadata that a module is handed
_EXTRA = "_extra_state"  # torch's key for what `set_extra_state` takes


class AllOrNothing(nn.Module):
    """A module that a state dict which does not fit leaves exactly as it was.

    Inside a bigger model torch asks one module after the other, and tells none whether missing and unexpected keys are
    errors. There a tensor that does not fit leaves all tensors of its module as they were; the keys are torch's affair.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch.nn.Module.load_state_dict, but all or nothing, and parts of a whole where parameters are sharded.

        Args:
            state_dict: tensors by name, in the layout of core.layout whichever class wrote them. For a DTensor
                parameter a DTensor, or the plain tensor of all experts, of which each rank takes its part; for a plain
                parameter either. Cast to the parameter's dtype.
            strict: refuse missing and unexpected keys too. A post-hook may forgive them: where the module has one,
                they are refused after loading.
            assign: take the tensors themselves, with their dtypes and devices, instead of copying their values.
        Returns:
            (missing_keys, unexpected_keys), as torch.
        Raises:
            StateDictError: a tensor does not fit or, if strict, a key is missing or unexpected; names every key with
                the shapes. Nothing was loaded.
        """
        if isinstance(state_dict, Mapping):  # other things are torch's to refuse
            state_dict, found = _copied(state_dict), _Found({}, [], [], [])
            _examine(self, _copied(state_dict), "", assign, found)
            forgiving = any(module._load_state_dict_post_hooks for module in self.modules())
            said = found.said(keys=strict and not forgiving)
            if said:
                do = "load the state dict of this config, or with strict=False what fits; nothing was loaded"
                raise StateDictError(f"a state dict of {type(self).__name__}", "; ".join(said), do)
        return super().load_state_dict(state_dict, strict, assign)

    def _read(self, name: str, value: Any) -> Any:
        """What a state dict's `value` stands for, in the shape of all experts. For subclasses that know other forms."""
        return value

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lists = missing_keys, unexpected_keys, error_msgs
        assign, hooks = local_metadata.get(_ASSIGN, False), self._load_state_dict_pre_hooks
        for hook in hooks.values():
            hook(state_dict, prefix, local_metadata, strict, *lists)
        own = _own(self)
        given = _given(self, own, state_dict, prefix)
        misfits = _misfits(own, given, prefix, assign)
        if misfits:
            error_msgs.extend(misfits)
            missing_keys.extend(prefix + name for name in own if name not in given)
            unexpected_keys.extend(_unexpected(self, own, state_dict, prefix))
            return
        fitted = {prefix + name: _fitted(own[name], value, assign) for name, value in given.items()}
        self._load_state_dict_pre_hooks = OrderedDict()  # they have run
        try:
            super()._load_from_state_dict({**state_dict, **fitted}, prefix, local_metadata, strict, *lists)
        finally:
            self._load_state_dict_pre_hooks = hooks


class _Found(NamedTuple):
    """What loading would find; the lists are what torch hands to a pre-hook."""

    shapes: dict[str, list[int]]
    missing: list[str]
    unexpected: list[str]
    misfits: list[str]

    def said(self, keys: bool) -> list[str]:
        """What to refuse, in words that begin as torch's do; missing and unexpected keys only if `keys`."""
        missing = [f"{key} {self.shapes.get(key, '')}".strip() for key in self.missing]
        named = {"Missing key(s)": missing, "Unexpected key(s)": self.unexpected}
        return [f"{what}: {', '.join(names)}" for what, names in named.items() if names and keys] + self.misfits


def _copied(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors by the same names. torch notes `assign` in the metadata, where the next load would find it."""
    copied: Any = OrderedDict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        copied._metadata = OrderedDict((name, dict(noted)) for name, noted in metadata.items())
    found: dict[str, Any] = copied
    return found


def _examine(module: nn.Module, state_dict: dict[str, Any], prefix: str, assign: bool, found: _Found) -> None:
    """What loading would find in `module` and inside it, in torch's order, without loading.

    A module that loads in ways of its own is not looked at.
    """
    for hook in module._load_state_dict_pre_hooks.values():
        hook(state_dict, prefix, {_ASSIGN: True} if assign else {}, True, *found[1:])
    if type(module)._load_from_state_dict in (AllOrNothing._load_from_state_dict, nn.Module._load_from_state_dict):
        own = _own(module)
        given = _given(module, own, state_dict, prefix)
        found.shapes.update({prefix + name: list(value.shape) for name, value in own.items()})
        found.missing.extend(prefix + name for name in own if name not in given)
        found.unexpected.extend(_unexpected(module, own, state_dict, prefix))
        found.misfits.extend(_misfits(own, given, prefix, assign))
    for name, child in module._modules.items():
        if child is not None:
            inner = f"{prefix}{name}."
            part = {key: value for key, value in state_dict.items() if key.startswith(inner)}
            _examine(child, part, inner, assign, found)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `module` itself that belong in a state dict."""
    transient = module._non_persistent_buffers_set
    buffers = {name: value for name, value in module._buffers.items() if name not in transient}
    return {name: value for name, value in {**module._parameters, **buffers}.items() if value is not None}


def _given(module: nn.Module, own: Iterable[str], state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What the state dict holds for them, by name."""
    given = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
    if not isinstance(module, AllOrNothing):
        return given
    return {name: module._read(name, value) if is_tensor_like(value) else value for name, value in given.items()}


def _unexpected(module: nn.Module, own: Iterable[str], state_dict: Iterable[str], prefix: str) -> list[str]:
    """Keys that are neither the module's own nor, by their first word, of a module inside it."""
    has_extra = type(module).set_extra_state is not nn.Module.set_extra_state
    names, found = {*own, *([_EXTRA] if has_extra else [])}, []
    for key in state_dict:
        first, dot, _ = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and first not in (module._modules if dot else names):
            found.append(key)
    return found


def _misfits(own: Mapping[str, Tensor], given: Mapping[str, Any], prefix: str, assign: bool) -> list[str]:
    found = [_misfit(prefix + name, own[name], value, assign) for name, value in given.items()]
    return [text for text in found if text]


def _misfit(key: str, own: Tensor, value: Any, assign: bool) -> str | None:
    """Why `value` cannot be loaded into `own`, in words that begin as torch's do."""
    if not is_tensor_like(value):
        return f"{key} is no tensor but a {type(value).__module__}.{type(value).__qualname__}"
    if value.shape != own.shape and not (own.ndim == 0 and tuple(value.shape) == (1,)):  # as torch 0.3 saved scalars
        return f"size mismatch for {key}: shape {list(value.shape)} in the state dict, {list(own.shape)} in the module"
    if value.is_meta and not (assign or own.is_meta):
        return f"{key} is on the meta device and holds no values"
    return None


def _fitted(own: Tensor, value: Any, assign: bool) -> Any:
    """`value` as torch can copy it into `own`, or assign it: what replaces a plain parameter is taken as it is."""
    return value if assign and not hasattr(own, "placements") else matching(own, value)
