"""What the libraries behind the dispatchers take, as data: refused here, in words, and not by a trap on the device.

After a trap a CUDA context is lost, and with it the process. Source of the numbers: the host and device assertions of
DeepEP v1.2.1, of its ElasticBuffer 2.1 and of its branch hybrid-ep, and of NCCL EP, by which Transformer Engine sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moebius.core.errors import ConfigError, Unsupported
from moebius.core.registry import Problem

# Where the buffers of all of them lie; "meta" is what may still become one.
DEVICES = ("cuda", "meta")
# In which they add up; what else they can send is for inference.
DTYPE = "bfloat16"


class Options(NamedTuple):
    """What a dispatcher over a library's communication buffer is built for; of the others max_tokens alone matters.

    Attributes:
        dim: D at most. n_experts: E. k: routes of a token.
        num_sms: multiprocessors that move tokens. share: one buffer for all layers that can use the same.
        asynchronous: tokens travel while the current stream computes, until they are needed.
        max_tokens: no rank has more in any call: then nothing is read on the host; None to read what there are.
    """

    dim: int
    n_experts: int
    k: int
    num_sms: int = 20
    share: bool = True
    asynchronous: bool = False
    max_tokens: int | None = None


class Limits(NamedTuple):
    """Of one library; None for no limit.

    Attributes:
        ranks: the numbers of ranks, or a range of them. multiple, most: of the hidden size. k: of top_k. held: experts
            on one rank. experts: in all. together: what the number of experts of all ranks is a multiple of.
        power: the number of experts on one rank is a power of two. capability: the least of a GPU.
        overlaps: can send while something else is computed.
        once: made once for a process, for all its layers, and for a number of tokens.
    """

    ranks: range | tuple[int, ...]
    multiple: int
    most: int | None = None
    k: int | None = None
    held: int | None = None
    experts: int | None = None
    together: int = 1
    power: bool = False
    capability: tuple[int, int] = (9, 0)
    overlaps: bool = True
    once: bool = False


_V1 = Limits(ranks=(2, 4, 8), multiple=16, most=8176, k=32, held=128, capability=(8, 0))
LIMITS = {
    "deepep": _V1,
    "uccl_ep": _V1,
    "deepep_elastic": Limits(ranks=range(2, 1025), multiple=256, k=32, held=256, experts=2048),
    "hybridep": Limits(ranks=range(2, 1025), multiple=16, together=4, overlaps=False),
    "te": Limits(ranks=range(2, 1025), multiple=8, k=32, together=4, power=True, overlaps=False, once=True),
}


def against(name: str, problem: Problem, k: int = 1) -> str | None:
    """Why the dispatcher of that name cannot serve, and which can; None where it can. On one rank all can."""
    if problem.ranks == 1:
        return None
    words = next(_words(LIMITS[name], problem, k), None)
    if words is None:
        return None
    # Not what is made once for a process: whether it can depends on the other layers.
    able = [other for other, limits in LIMITS.items() if not limits.once and not any(_words(limits, problem, k))]
    others = map(repr, able)
    return f"{words}; {', '.join([*others, repr('alltoall')])} can"


def require(name: str, problem: Problem, options: Options, combine_dtype: str | None = None) -> None:
    """Refuse what `name` cannot do, wherever it is not a library's limit alone; on one rank a library can do all.

    Args:
        options, combine_dtype: see the dispatcher.
    Raises:
        Unsupported: a limit is passed. ConfigError: a setting that nothing could use.
    """
    require_counts(name, options.max_tokens)
    if name not in LIMITS or problem.ranks == 1:
        return
    asked = f"dispatch backend {name!r} for {problem}, K={options.k}, {problem.ranks} ranks"
    found = against(name, problem, options.k)
    if found is not None:
        raise Unsupported(asked, found, "name one that can, or None to choose")
    if combine_dtype not in (None, DTYPE):
        found = f"{name!r} adds {DTYPE} alone"
        raise Unsupported(f"combine_dtype={combine_dtype!r}", found, "leave it out, or name 'alltoall'")
    num_sms = options.num_sms
    if num_sms < 2 or num_sms % 2:
        raise ConfigError(f"{asked}, dispatcher_num_sms={num_sms}", "no even number of 2 or more", "use 20 or 24")
    if options.asynchronous and not LIMITS[name].overlaps:
        found = f"{name!r} has no asynchronous calls"
        raise Unsupported(f"{asked}, dispatcher_async_dispatch=True", found, "leave it out, or name 'deepep'")
    if LIMITS[name].once:
        _require_once(name, asked, options)


def _require_once(name: str, asked: str, options: Options) -> None:
    """Refuse what does not fit a library that is made once for a process.

    Raises:
        Unsupported: no number of tokens, a buffer for each layer, or more routes than experts.
    """
    if options.max_tokens is None:
        found = f"{name!r} is made once, for a number of tokens"
        do = "give the most that a rank has in any call, alike on every rank"
        raise Unsupported(f"{asked}, dispatcher_max_tokens=None", found, do)
    if not options.share:
        found = f"{name!r} has one buffer for a process"
        raise Unsupported(f"{asked}, dispatcher_share_token_dispatcher=False", found, "leave it out")
    if options.k > options.n_experts:
        raise Unsupported(asked, f"it takes K up to the number of experts, {options.n_experts}", "name 'alltoall'")


def require_counts(name: str | None, max_tokens: int | None) -> None:
    """Refuse a number of tokens, with which nothing is read on the host, for a dispatcher that has to count.

    Raises:
        Unsupported: it has.
    """
    if name == "alltoall" and max_tokens is not None:
        found = "alltoall counts what travels, on the host"
        raise Unsupported(f"dispatcher_max_tokens={max_tokens}", found, "name 'allgather', or leave it out")


def _words(limits: Limits, problem: Problem, k: int) -> Iterator[str]:
    """Each limit that is passed: what it is, and what was found where the problem's own words do not say it."""
    ranks, dim, held = problem.ranks, problem.dim, problem.n_experts
    if problem.device not in DEVICES:
        yield "it needs CUDA tensors"
    if problem.dtype != DTYPE:
        yield f"it sends {DTYPE} alone"
    if problem.capability is not None and problem.capability < limits.capability:
        yield f"it needs compute capability {limits.capability[0]}.{limits.capability[1]}"
    if ranks not in limits.ranks:
        several = limits.ranks
        text = f"{several[0]} to {several[-1]}" if isinstance(several, range) else ", ".join(map(str, several))
        yield f"it takes {text} ranks, not {ranks}"
    if dim % limits.multiple or (limits.most is not None and dim > limits.most):
        most = "" if limits.most is None else f" up to {limits.most}"
        yield f"it takes hidden sizes that are multiples of {limits.multiple}{most}, not {dim}"
    if limits.k is not None and k > limits.k:
        yield f"it takes K up to {limits.k}, not {k}"
    if limits.held is not None and held > limits.held:
        yield f"it takes up to {limits.held} experts on a rank, not {held}"
    if limits.experts is not None and held * ranks > limits.experts:
        yield f"it takes up to {limits.experts} experts, not {held * ranks}"
    if limits.power and held & (held - 1):
        yield f"it takes a power of two of experts on a rank, not {held}"
    if held * ranks % limits.together:
        yield f"it takes numbers of experts that are multiples of {limits.together}, not {held * ranks}"
