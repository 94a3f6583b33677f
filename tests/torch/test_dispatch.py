"""Steps 3 and 9 by themselves: on one rank, and over several, against the reference's list of ranks."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.core import ConfigError, MoEError, ShapeError, Unsupported, reference
from moebius.core.reference import Tokens
from moebius.core.registry import Problem
from moebius.torch_frontend import Dispatcher, Local
from moebius.torch_frontend.dispatch import DISPATCHERS

E, D, K = 8, 3, 2
LENGTHS = [(3, 2), (5, 0), (0, 0), (4, 1, 0, 3), (0, 0, 0, 2), (2, 2, 2, 2)]
DTYPES = ["float64", "float32", "bfloat16", "float16"]
over_ranks = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
KINDS = ("allgather", "alltoall")
kinds = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------------------------------------------ one rank
def test_local_turns_every_id_without_a_route_into_the_first_past_the_end() -> None:
    ids = torch.tensor([[0, 3], [-1, 4], [2, -7], [1, 2**31 - 1], [2**32, 2]])
    mask = torch.tensor([True, True, False, True, True])
    sent, state = Local().dispatch(torch.zeros(5, 2), torch.ones(5, 2), ids, mask, 4)
    assert sent.ids_SK.tolist() == [[0, 3], [4, 4], [4, 4], [1, 4], [4, 2]]
    assert state is None and sent.ids_SK.dtype == torch.int32


@pytest.mark.parametrize("x, weights, out", [("bfloat16", "bfloat16", "float32"), ("float64", "float32", "float64")])
def test_local_promotes_weights_and_returns_their_gradient_in_their_dtype(x: str, weights: str, out: str) -> None:
    value = torch.ones(3, 2, dtype=getattr(torch, weights), requires_grad=True)
    x_TD = torch.zeros(3, 2, dtype=getattr(torch, x))
    sent, _ = Local().dispatch(x_TD, value, torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.bool), 4)
    assert sent.weights_SK.dtype == getattr(torch, out)
    sent.weights_SK.sum().backward()
    assert value.grad is not None and value.grad.dtype == value.dtype


def test_local_is_a_dispatcher_of_one_rank_and_combines_into_what_it_is_given() -> None:
    y = torch.ones(3, 2)
    assert isinstance(Local(), Dispatcher) and (Local().ranks, Local().rank) == (1, 0)
    assert Local().combine(y, None) is y


# ------------------------------------------------------------------------------------------------------------- choosing
def _problem(n: int) -> Problem:
    return Problem(device="cpu", dtype="float32", dim=2, inter_dim=2, n_experts=4, ranks=n)


@pytest.mark.parametrize("name", [None, "local", *KINDS])
def test_dispatchers_on_one_rank_are_local(name: str | None) -> None:
    assert isinstance(DISPATCHERS.implementation(DISPATCHERS.choose(name, _problem(1)))(), Local)


def test_dispatchers_over_ranks_are_all_gather_or_the_named_one() -> None:
    assert DISPATCHERS.choose(None, _problem(4)).name == "allgather"
    for name in KINDS:
        assert DISPATCHERS.choose(name, _problem(4)).name == name and DISPATCHERS[name].reads_host


@pytest.mark.parametrize("name", ["local", "mok"])
def test_dispatchers_that_cannot_serve_ranks_are_refused_in_words(name: str) -> None:
    found = "the experts lie on 4 ranks" if name == "local" else "this version does not have it yet"
    with pytest.raises(Unsupported, match=found):
        DISPATCHERS.choose(name, _problem(4))


def test_all_gather_without_a_process_group_is_refused() -> None:
    from moebius.torch_frontend.dispatch_allgather import AllGather

    with pytest.raises(ConfigError, match=r"do: call torch.distributed.init_process_group first"):
        AllGather()


# ---------------------------------------------------------------------------------------------------------- over ranks
def _drawn(lengths: tuple[int, ...]) -> tuple[list[Tokens], list[np.ndarray], list[np.ndarray]]:
    """Every rank's tokens, and what each rank makes of all of them: outputs, then gradients of x.

    Integers: exact in every dtype, and their sums are exact in float32 but not in 16 bits.
    """
    rng = np.random.default_rng(len(lengths))
    s = sum(lengths)
    cuts = np.cumsum(lengths)[:-1]
    columns = (
        rng.integers(-255, 255, (s, D)).astype(float),
        rng.integers(0, 255, (s, K)).astype(float),
        rng.choice([-2, -1, *range(E), E, E + 1, 2**32], (s, K)),  # the last would be 0 if it were narrowed first
        rng.random(s) < 0.8,
    )
    tokens = [
        Tokens(x_TD=x, weights_TK=weights, ids_TK=ids, token_mask_T=mask)
        for x, weights, ids, mask in zip(*(np.split(column, cuts) for column in columns), strict=True)
    ]
    outputs = [rng.integers(-(2**15), 2**15, (s, D)).astype(float) for _ in lengths]
    return tokens, outputs, [rng.integers(-255, 255, (s, D)).astype(float) for _ in lengths]


def _here(lengths: tuple[int, ...], kind: str) -> list[np.ndarray]:
    """[S] of each rank: which of all tokens it is sent."""
    sent = reference.dispatch(_drawn(lengths)[0], E)
    routed = [(rank.ids_TK < E // len(lengths)).any(1) & rank.token_mask_T for rank in sent]
    return routed if kind == "alltoall" else [np.ones_like(own) for own in routed]


def _made(parts: list[np.ndarray], here: list[np.ndarray]) -> list[np.ndarray]:
    """What a rank makes of tokens that it is not sent: nothing."""
    return [part * own[:, None] for part, own in zip(parts, here, strict=True)]


def _dispatcher(kind: str, **settings: str) -> Dispatcher:
    from moebius.torch_frontend.dispatch_allgather import AllGather
    from moebius.torch_frontend.dispatch_alltoall import AllToAll

    made: Dispatcher = {"allgather": AllGather, "alltoall": AllToAll}[kind](**settings)
    return made


def _dispatched(lengths: tuple[int, ...]) -> dict[tuple[str, str], list[torch.Tensor]]:
    """On one rank: what dispatch and combine give, and the gradients of both, by every dispatcher in every dtype."""
    rank, found = dist.get_rank(), {}
    for name, dtype in product(KINDS, DTYPES):
        here = _here(lengths, name)[rank]
        tokens, outputs, dx = _drawn(lengths)
        own, kind = tokens[rank], getattr(torch, dtype)
        accumulate = torch.promote_types(kind, torch.float32)
        # With other strides: what the model hands over need not be contiguous.
        x, weights = (
            torch.from_numpy(value).to(kind).T.contiguous().T.requires_grad_() for value in (own.x_TD, own.weights_TK)
        )
        dispatcher = _dispatcher(name)
        ids, mask = torch.from_numpy(own.ids_TK), torch.from_numpy(own.token_mask_T)
        sent, state = dispatcher.dispatch(x, weights, ids, mask, E)
        (sent.x_SD * torch.from_numpy(dx[rank][here]).to(kind)).sum().backward(retain_graph=True)
        (sent.weights_SK * (rank + 1)).sum().backward()
        y_SD = torch.from_numpy(outputs[rank][here]).to(accumulate).requires_grad_()
        y = dispatcher.combine(y_SD, state)
        y.backward(x.detach() + 1)
        wide = _dispatcher(name, combine_dtype="float32").combine(y_SD, state)
        found[name, dtype] = [*(value.detach() for value in (*sent, y)), x.grad, weights.grad, y_SD.grad, wide.detach()]
    return found


@cache
def _outcomes(lengths: tuple[int, ...]) -> list[dict[tuple[str, str], list[torch.Tensor]]]:
    return ranks.run(_dispatched, len(lengths), lengths)


def _equal(found: torch.Tensor, wanted: np.ndarray, dtype: torch.dtype) -> None:
    """The very numbers that `wanted`, exact in float64, is rounded to."""
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(wanted)).to(dtype), rtol=0, atol=0)


@over_ranks
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_gives_every_rank_what_the_reference_does(lengths: tuple[int, ...], kind: str, dtype: str) -> None:
    wanted, here, own = reference.dispatch(_drawn(lengths)[0], E), _here(lengths, kind), getattr(torch, dtype)
    for want, mine, outcome in zip(wanted, here, _outcomes(lengths), strict=True):
        x_SD, weights_SK, ids_SK, *_ = outcome[kind, dtype]
        _equal(x_SD, want.x_TD[mine], own)
        _equal(weights_SK, want.weights_TK[mine], torch.promote_types(own, torch.float32))
        ids = np.where(want.token_mask_T[:, None], want.ids_TK, E // len(lengths))
        _equal(ids_SK, ids[mine], torch.int32)


def test_alltoall_sends_no_token_to_a_rank_without_a_route_for_it() -> None:
    sent = [own.sum() for lengths in LENGTHS for own in _here(lengths, "alltoall")]
    most = [len(own) for lengths in LENGTHS for own in _here(lengths, "alltoall")]
    assert 0 < sum(sent) < 0.7 * sum(most)


@over_ranks
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_rounds_each_ranks_part_once_and_their_sum_once(
    lengths: tuple[int, ...], kind: str, dtype: str
) -> None:
    outputs = _made(_drawn(lengths)[1], _here(lengths, kind))
    short = [torch.from_numpy(part).to(getattr(torch, dtype)).double().numpy() for part in outputs]
    cases = [(7, outputs)] if dtype != "float64" else []  # combine_dtype="float32": the sum alone
    for place, parts in [(3, short), *cases]:
        wanted = reference.combine(list(lengths), parts)
        for want, outcome in zip(wanted, _outcomes(lengths), strict=True):
            _equal(outcome[kind, dtype][place], want, getattr(torch, dtype))


@over_ranks
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_gradients_are_sums_over_ranks_rounded_once(lengths: tuple[int, ...], kind: str, dtype: str) -> None:
    own, n, here = getattr(torch, dtype), len(lengths), _here(lengths, kind)
    tokens, _, dx = _drawn(lengths)
    dweights = [np.full((sum(lengths), K), rank + 1.0) for rank in range(n)]
    wanted = reference.dispatch_vjp(list(lengths), _made(dx, here), _made(dweights, here))
    dy_SD = reference.combine_vjp([rank.x_TD + 1 for rank in tokens])
    for rank, outcome in enumerate(_outcomes(lengths)):
        *_, found_dx, found_dweights, found_dy, _ = outcome[kind, dtype]
        _equal(found_dx, wanted[rank][0], own)
        _equal(found_dweights, wanted[rank][1], own)
        _equal(found_dy, dy_SD[rank][here[rank]], torch.promote_types(own, torch.float32))


def test_the_drawn_sums_are_inexact_in_16_bits() -> None:
    """Else the tests above would not see whether a sum was rounded once."""
    _, outputs, dx = _drawn((4, 1, 0, 3))
    for parts in (outputs, dx):
        short = sum((torch.from_numpy(part).bfloat16() for part in parts), torch.zeros((), dtype=torch.bfloat16))
        exact = torch.from_numpy(np.sum(parts, axis=0))
        assert (short != exact.bfloat16()).any() and torch.equal(exact.float().double(), exact)


# -------------------------------------------------------------------------------------------------- all ranks together
def _collectives(kind: str) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the collectives in the order in which this rank enters them, forward and backward, of four cases."""
    from moebius.torch_frontend import dispatch_allgather, dispatch_ranks

    log: list[str] = []

    def logged(function, name):
        def call(*args, **settings):
            log.append(name)
            return function(*args, **settings)

        return call

    gather = logged(dispatch_ranks.all_gather, "gather")
    dispatch_ranks.all_gather = dispatch_allgather.all_gather = gather
    dist.all_to_all_single = logged(dist.all_to_all_single, "exchange")
    forward, backward = [], []
    for lengths, ids, masked, wanted in [
        ((5, 0), 0, False, True),
        ((1, 3), E - 1, False, True),
        ((2, 2), 3, True, True),
        ((2, 2), 3, False, False),  # nobody wants the gradient of x
    ]:
        t = lengths[dist.get_rank()]
        x, weights = torch.ones(t, D, requires_grad=wanted), torch.ones(t, K, requires_grad=True)
        dispatcher = _dispatcher(kind)
        mask = torch.full((t,), not masked)
        sent, state = dispatcher.dispatch(x, weights, torch.full((t, K), ids), mask, E)
        y = dispatcher.combine(sent.x_SD * sent.weights_SK.sum(1, keepdim=True), state)
        forward.append(log[:])
        log.clear()
        y.sum().backward()
        assert (x.grad is not None) == wanted and weights.grad is not None
        backward.append(log[:])
        log.clear()
    return forward, backward


def test_all_gather_enters_the_same_collectives_on_every_rank_whatever_the_tokens() -> None:
    for forward, backward in ranks.run(_collectives, 2, "allgather"):
        assert forward == [["gather", "gather", "gather", "exchange"]] * 4
        assert backward == [["gather", "exchange", "exchange"]] * 3 + [["gather", "exchange"]]


def test_alltoall_enters_the_same_collectives_on_every_rank_and_none_where_nobody_sends() -> None:
    for forward, backward in ranks.run(_collectives, 2, "alltoall"):
        whole = ["gather", "exchange", "exchange", "exchange"]
        assert forward == [whole, whole, ["gather"], whole]
        assert backward == [["exchange"] * 3] * 2 + [[]] + [["exchange"] * 2]


class _Reads(TorchDispatchMode):
    """Notes what makes the host wait for a GPU: values, and sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        plain = torch.Tensor.tolist  # which asks no operator
        torch.Tensor.tolist = lambda value: (self.found.append("tolist"), plain(value))[1]

    def __torch_dispatch__(self, function, types, args=(), settings=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            getattr(value, "dtype", None) == torch.bool for value in (args[1] if isinstance(args[1], list) else ())
        )
        if name in self.NAMES or by_mask:
            self.found.append(name)
        return function(*args, **(settings or {}))


def _read() -> list[tuple[list[str], list[str], list[str], bool]]:
    """Of each of READING: collectives, what is read in a forward pass, and in its backward pass; what it declares."""
    from moebius.torch_frontend import dispatch_allgather, dispatch_ranks
    from moebius.torch_frontend.dispatch import Options

    log: list[str] = []

    def logged(function, name):
        def call(*args, **settings):
            log.append(name)
            return function(*args, **settings)

        return call

    gather = logged(dispatch_ranks.all_gather, "gather")
    dispatch_ranks.all_gather = dispatch_allgather.all_gather = gather
    dist.all_to_all_single = logged(dist.all_to_all_single, "exchange")
    t, found, reads = 3 if dist.get_rank() else 0, [], _Reads()
    for name, max_tokens in READING:
        x, weights = torch.ones(t, D, requires_grad=True), torch.ones(t, K, requires_grad=True)
        ids, mask = torch.zeros(t, K, dtype=torch.int64), torch.ones(t, dtype=torch.bool)
        options = Options(D, E, K, max_tokens=max_tokens)
        dispatcher = DISPATCHERS.implementation(DISPATCHERS[name])(dist.group.WORLD, None, options)
        with reads:
            sent, state = dispatcher.dispatch(x, weights, ids, mask, E)
            y = dispatcher.combine(sent.x_SD * sent.weights_SK.sum(1, keepdim=True), state)
            forward = reads.found[:]
            reads.found.clear()
            y.sum().backward()
        assert y.shape == (t, D) and (max_tokens is None or sent.x_SD.shape == (2 * max_tokens, D))
        found.append((log[:], forward, reads.found[:], dispatcher.reads_host))
        log.clear()
        reads.found.clear()
    return found


# Dispatcher and its max_tokens.
READING = [("alltoall", None), ("allgather", None), ("allgather", 4)]


@cache
def _readings() -> list[list[tuple[list[str], list[str], list[str], bool]]]:
    return ranks.run(_read, 2)


def test_dispatchers_read_on_the_host_once_in_a_forward_pass_or_never_as_they_declare() -> None:
    for readings in _readings():
        assert [(forward, backward, declared) for _, forward, backward, declared in readings] == [
            (["tolist"], [], True),
            (["tolist"], [], True),
            ([], [], False),
        ]


def test_all_gather_of_at_most_so_many_tokens_enters_no_collective_to_count_them() -> None:
    for *_, (log, *_) in _readings():
        assert log == ["gather", "gather", "exchange", "gather", "exchange", "exchange"]


def _interleaved(lengths: tuple[int, ...]) -> list[bool]:
    """Two layers that differ in D, E and K, both dispatched before one is combined: each as alone."""
    rank, found = dist.get_rank(), []
    for kind in KINDS:
        layers = [_dispatcher(kind), _dispatcher(kind)]

        def drawn(number: int) -> tuple[torch.Tensor, ...]:
            generator, t, k = torch.Generator().manual_seed(10 * rank + number), lengths[rank], K + number
            x, weights = torch.randn(t, D + number, generator=generator), torch.rand(t, k, generator=generator)
            ids = torch.randint(0, E * (1 + number), (t, k), generator=generator)
            return x.requires_grad_(), weights.requires_grad_(), ids, torch.ones(t, dtype=torch.bool)

        def results(numbers: list[int], drawn=drawn, layers=layers) -> list[torch.Tensor]:
            own = [drawn(number) for number in numbers]
            away = [layers[n].dispatch(*one, E * (1 + n)) for n, one in zip(numbers, own, strict=True)]
            outputs = [
                layers[n].combine((2 + n) * sent.x_SD * sent.weights_SK.sum(1, keepdim=True), state)
                for n, (sent, state) in zip(numbers, away, strict=True)
            ]
            for y in outputs:  # in the order of the forward passes
                y.square().sum().backward()
            return [v for y, (x, weights, *_) in zip(outputs, own, strict=True) for v in (y, x.grad, weights.grad)]

        alone = [*results([0]), *results([1])]
        found += [torch.equal(a, b) for a, b in zip(alone, results([0, 1]), strict=True)]
    return found


@pytest.mark.parametrize("lengths", [(3, 2), (4, 1, 0, 3)], ids=str)
def test_two_layers_that_differ_under_way_at_once_over_ranks_are_each_as_alone(lengths: tuple[int, ...]) -> None:
    assert ranks.run(_interleaved, len(lengths), lengths) == [[True] * 12] * len(lengths)


def _too_many() -> str:
    from moebius.torch_frontend.dispatch_allgather import AllGather

    mask = torch.ones(5, dtype=torch.bool)
    try:
        AllGather(None, None, max_tokens=4).dispatch(torch.ones(5, D), torch.ones(5, K), torch.zeros(5, K), mask, E)
    except ShapeError as error:
        return str(error)
    return ""


def test_all_gather_of_more_tokens_than_it_was_told_is_refused() -> None:
    for said in ranks.run(_too_many, 2):
        assert "allgather of 5 tokens" in said and "dispatcher_max_tokens=4" in said


def _functions() -> dict[str, object]:
    """What else is asked of one rank of two, each with what is true of it."""
    from moebius.torch_frontend.dispatch_allgather import AllGather, _AllGatherConcatVarlenFn

    rank = dist.get_rank()
    ids, mask, found = torch.zeros(2, K, dtype=torch.int64), torch.ones(2, dtype=torch.bool), {}

    # The documented function, of other shapes than tokens.
    for shape in [(), (2, 3)]:
        local = torch.arange(1.0, 3.0 + rank).view(-1, *[1] * len(shape)).expand(-1, *shape).clone().requires_grad_()
        whole = _AllGatherConcatVarlenFn.apply(local, None, [2, 3], 3)
        seen: list[torch.Tensor] = []
        whole.register_hook(lambda grad, seen=seen: seen.extend([grad, grad.clone()]))
        (whole * (rank + 1)).sum().backward()
        assert torch.equal(seen[0], seen[1]), "the gradient of others was written to"
        found[f"gathered {shape}"] = whole.detach(), local.grad

    # Second derivatives: sum_r (r + 1) * x^2, whose gradient is 6 x and whose second derivative 6.
    x = torch.full((2, D), 1.0 + rank, requires_grad=True)
    dispatcher = AllGather()
    sent, state = dispatcher.dispatch(x, torch.ones(2, K), ids, mask, E)
    y = dispatcher.combine(sent.x_SD**2 * (rank + 1), state)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    found["derivatives"] = y.detach(), first.detach(), second

    # One rank alone wants the gradient of x: the others take part.
    x = torch.ones(2, D, requires_grad=rank == 1)
    sent, state = dispatcher.dispatch(x, torch.ones(2, K), ids, mask, E)
    dispatcher.combine(sent.x_SD * (rank + 1), state).sum().backward()
    found["wanted on one rank"] = x.grad

    sent, state = dispatcher.dispatch(torch.ones(2, D), torch.ones(2, K), ids, mask, E)
    found["wanted nowhere"] = dispatcher.combine(sent.x_SD, state).requires_grad

    found["errors"] = {}
    for name, kind, e, grad in [
        ("widths", (2, D + rank), E, True),
        ("experts", (2, D), E * (rank + 1), True),
        ("rest", (2, D), E + 1, True),
        ("grad", (2, D), E, rank == 0),
        ("grad of parameters", (2, D), E, rank == 0),
    ]:
        x = torch.ones(kind, requires_grad=name != "grad of parameters")
        try:
            with torch.set_grad_enabled(grad):
                dispatcher.dispatch(x, torch.ones(2, K), ids, mask, e)
        except MoEError as error:
            found["errors"][name] = type(error), str(error)
    try:
        AllGather(dist.new_group([1 - rank]) if rank == 0 else [dist.new_group([1]), dist.new_group([0])][1])
    except ConfigError as error:
        found["errors"]["group"] = type(error), str(error)
    return found


@cache
def _facts() -> list[dict[str, object]]:
    return ranks.run(_functions, 2)


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)
def test_all_gather_concat_varlen_fn_concatenates_and_sums_gradients_into_new_memory(shape: tuple[int, ...]) -> None:
    for rank, facts in enumerate(_facts()):
        whole, grad = facts[f"gathered {shape}"]
        rows = torch.tensor([1.0, 2, 1, 2, 3]).view(-1, *[1] * len(shape)).expand(-1, *shape)
        torch.testing.assert_close(whole, rows, rtol=0, atol=0)
        torch.testing.assert_close(grad, torch.full((2 + rank, *shape), 3.0), rtol=0, atol=0)


def test_all_gather_has_second_derivatives() -> None:
    for rank, facts in enumerate(_facts()):
        y, first, second = facts["derivatives"]
        x = 1.0 + rank
        assert (y == 3 * x**2).all() and (first == 6 * x).all() and (second == 6).all()


def test_all_gather_whose_gradient_one_rank_wants_takes_all_ranks_through_backward() -> None:
    zero, one = (facts["wanted on one rank"] for facts in _facts())
    assert zero is None and (one == 3).all()
    assert [facts["wanted nowhere"] for facts in _facts()] == [False, False]


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("widths", ShapeError, "rank 0: D=3, K=2, E=8, float32; rank 1: D=4, K=2, E=8, float32"),
        ("experts", ShapeError, "rank 0: D=3, K=2, E=8, float32; rank 1: D=3, K=2, E=16, float32"),
        ("rest", ConfigError, "asked: 9 experts over 2 ranks\nfound: 1 left over"),
        ("grad", ConfigError, "none on rank 1, some on others"),
        ("grad of parameters", ConfigError, "none on rank 1, some on others"),
    ],
)
def test_all_gather_of_ranks_that_do_not_fit_is_refused_on_every_rank(name: str, kind: type, words: str) -> None:
    for facts in _facts():
        found, text = facts["errors"][name]
        assert found is kind and words in text


def test_all_gather_of_another_ranks_group_is_refused() -> None:
    for rank, facts in enumerate(_facts()):
        assert f"global rank {rank} is not in it" in facts["errors"]["group"][1]
