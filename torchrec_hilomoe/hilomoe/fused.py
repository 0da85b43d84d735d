"""A site's forward and backward by Triton kernels, in the place of `operators`' own.

The kernels do what passes over the rows; sums over rows, which are the parameters' gradients, are
plain products. Unlike the other backends this one does not leave the base map to PyTorch, so with
experts that add nothing the outputs are those of ``nn.Linear`` to rounding, not to the bit.

A kernel's program owns a block of rows. It multiplies them with all keys and down-vectors, runs the
layers' recursion over scores (`routing`), and then, tile by tile of the output, adds the chosen
experts to the base map's product while that is still in registers: the output is written once, and
what the experts add is never stored. Logits, hidden values and gates do pass through memory, a few
numbers a row that stay in the cache; each is read by the program that wrote it, after a barrier.
Triton's interpreter runs the kernels without a GPU (``TRITON_INTERPRET=1``).

Shape legend: as in `function`, but K for k, and
    A size with a P is padded to a power of two; BN, BD, BO are the sizes of tiles.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.execution import Execution
from torchrec_hilomoe.hilomoe.losses import choice_counts, loss_gradients, wide

__all__ = ["backward_kernel", "forward_kernel", "site", "site_backward"]

ROWS, WIDTH = 64, 64  # of a tile
LEAST = 16  # a side of a product that tensor cores take


@triton.jit
def _tile(start, rows, columns, stride, row_limit, column_limit):
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    return tl.load(start + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put(start, rows, columns, stride, row_limit, column_limit, values):
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    tl.store(start + rows[:, None] * stride + columns[None, :], values, mask=inside)


@triton.jit
def _multiply(acc, left, right, rows, columns, inner, row_limit, column_limit, BK: tl.constexpr):
    """Add ``left @ right.T``, both with contiguous rows of ``inner`` numbers."""
    for at in range(0, inner, BK):
        ks = at + tl.arange(0, BK)
        a = _tile(left, rows, ks, inner, row_limit, inner)
        b = _tile(right, columns, ks, inner, column_limit, inner)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def forward_kernel(
    x, query, weight, bias, down, up, keys, gram,  # read
    y, direct, hidden, weighted, scores, passed, logsumexp, gates, chosen,  # written
    N, D, OUT, Q,
    L: tl.constexpr, E: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    EP: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    HAS_BIAS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Route, and write outputs; ``keys`` are scaled, ``gram`` is theirs with the unscaled."""
    M: tl.constexpr = L * E
    H: tl.constexpr = M * R
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    here = rows < N
    ms, hs, es = tl.arange(0, MP), tl.arange(0, HP), tl.arange(0, EP)

    products = tl.zeros([BN, MP], tl.float32)
    products = _multiply(products, query, keys, rows, ms, Q, N, M, BD)
    _put(direct, rows, ms, M, N, M, products)
    dots = tl.zeros([BN, HP], tl.float32)
    dots = _multiply(dots, x, down, rows, hs, D, N, H, BD)
    _put(hidden, rows, hs, H, N, H, dots.to(hidden.dtype.element_ty))
    tl.debug_barrier()

    known = es < E
    for layer in tl.static_range(L):
        logits = _tile(direct + layer * E, rows, es, M, N, E)
        for before in tl.static_range(layer):
            p = tl.trans(_tile(passed + before * E * N, es, rows, N, E, N))
            block = _tile(gram + layer * E * M + before * E, es, es, M, E, E)
            logits = tl.dot(p, tl.trans(block), logits, input_precision="ieee")
        logits = tl.where(known[None, :], logits, float("-inf"))
        top = tl.max(logits, axis=1)
        powers = tl.exp(logits - top[:, None])
        total = tl.sum(powers, axis=1)
        score = powers / total[:, None]
        _put(scores + layer * E * N, es, rows, N, E, N, tl.trans(score))
        tl.store(logsumexp + layer * N + rows, top + tl.log(total), mask=here)

        gate = tl.zeros([BN, EP], tl.float32)
        for choice in tl.static_range(K):
            # A row with a NaN chooses anything that there is: its gates are NaN all the same.
            best = tl.minimum(tl.argmax(logits, axis=1), E - 1)
            hot = es[None, :] == best[:, None]
            at = (layer * K + choice) * N + rows
            tl.store(chosen + at, best.to(tl.int64), mask=here)
            tl.store(gates + at, tl.sum(tl.where(hot, score, 0.0), axis=1), mask=here)
            gate = tl.where(hot, score, gate)
            logits = tl.where(hot, float("-inf"), logits)
        if SELECTED:
            _put(passed + layer * E * N, es, rows, N, E, N, tl.trans(gate))
        for r in tl.static_range(R):
            vectors = (layer * E + es) * R + r
            inside = here[:, None] & known[None, :]
            place = rows[:, None] * H + vectors[None, :]
            values = tl.load(hidden + place, mask=inside, other=0.0)
            tl.store(weighted + place, gate.to(values.dtype) * values, mask=inside)
        tl.debug_barrier()

    w = _tile(weighted, rows, hs, H, N, H)
    for start in range(0, OUT, BO):
        os = start + tl.arange(0, BO)
        acc = tl.dot(w, _tile(up, hs, os, OUT, H, OUT), input_precision="ieee")
        acc = _multiply(acc, x, weight, rows, os, D, N, OUT, BD)
        if HAS_BIAS:
            acc += tl.load(bias + os, mask=os < OUT, other=0.0)[None, :]
        _put(y, rows, os, OUT, N, OUT, acc.to(y.dtype.element_ty))


@triton.jit
def backward_kernel(
    grad, weight, down, up, keys, gram, hidden, scores, logsumexp, chosen, loss_scores, loss_z,
    grad_weighted, grad_hidden, grad_direct, grad_x,  # written
    N, D, OUT,
    L: tl.constexpr, E: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    EP: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    HAS_LOSS: tl.constexpr, SELECTED: tl.constexpr, STOP_SCORES: tl.constexpr,
    NEEDS_X: tl.constexpr, THROUGH_QUERY: tl.constexpr,
):  # fmt: skip
    """From the output's gradient to those of hidden values, direct logits and input.

    ``THROUGH_QUERY`` says that the input is the query, so that its gradient has that part, too.
    """
    M: tl.constexpr = L * E
    H: tl.constexpr = M * R
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    here = rows < N
    ms, hs, es = tl.arange(0, MP), tl.arange(0, HP), tl.arange(0, EP)
    known = es < E

    dots = tl.zeros([BN, HP], tl.float32)
    dots = _multiply(dots, grad, up, rows, hs, OUT, N, H, BO)
    _put(grad_weighted, rows, hs, H, N, H, dots)
    tl.debug_barrier()

    for back in tl.static_range(L):
        layer = L - 1 - back
        score = tl.trans(_tile(scores + layer * E * N, es, rows, N, E, N))
        wanted = tl.zeros([BN, EP], tl.float32)  # by what later layers saw of this one
        if not STOP_SCORES:
            for after in tl.static_range(L - back, L):
                later = _tile(grad_direct + after * E, rows, es, M, N, E)
                block = _tile(gram + after * E * M + layer * E, es, es, M, E, E)
                wanted = tl.dot(later, block, wanted, input_precision="ieee")
        is_chosen = tl.zeros([BN, EP], tl.float32)
        for choice in tl.static_range(K):
            best = tl.load(chosen + (layer * K + choice) * N + rows, mask=here, other=0)
            is_chosen += (es[None, :] == best[:, None]).to(tl.float32)
        by_gate = tl.zeros([BN, EP], tl.float32)
        for r in tl.static_range(R):
            vectors = (layer * E + es) * R + r
            inside = here[:, None] & known[None, :]
            place = rows[:, None] * H + vectors[None, :]
            by_weighted = tl.load(grad_weighted + place, mask=inside, other=0.0)
            values = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
            by_gate += by_weighted * values
            by_hidden = by_weighted * score * is_chosen
            tl.store(grad_hidden + place, by_hidden.to(grad_hidden.dtype.element_ty), mask=inside)
        by_score = (by_gate + wanted) * is_chosen if SELECTED else by_gate * is_chosen + wanted
        if HAS_LOSS:
            by_score += tl.load(loss_scores + layer * E + es, mask=known, other=0.0)[None, :]
        shift = tl.sum(score * by_score, axis=1)
        if HAS_LOSS:
            lse = tl.load(logsumexp + layer * N + rows, mask=here, other=0.0)
            shift -= 2.0 * tl.load(loss_z) * lse
        by_logits = (by_score - shift[:, None]) * score
        _put(grad_direct + layer * E, rows, es, M, N, E, by_logits)
        tl.debug_barrier()

    if NEEDS_X:
        by_hidden = _tile(grad_hidden, rows, hs, H, N, H)
        by_direct = _tile(grad_direct, rows, ms, M, N, M).to(keys.dtype.element_ty)
        for start in range(0, D, BD):
            ds = start + tl.arange(0, BD)
            acc = tl.dot(by_hidden, _tile(down, hs, ds, D, H, D), input_precision="ieee")
            if THROUGH_QUERY:
                key = _tile(keys, ms, ds, D, M, D)
                acc = tl.dot(by_direct, key, acc, input_precision="ieee")
            for at in range(0, OUT, BO):
                os = at + tl.arange(0, BO)
                a = _tile(grad, rows, os, OUT, N, OUT)
                acc = tl.dot(a, _tile(weight, os, ds, D, OUT, D), acc, input_precision="ieee")
            _put(grad_x, rows, ds, D, N, D, acc.to(grad_x.dtype.element_ty))


# Triton's annotations are for the compiler of kernels, not for those who call them.
_forward_kernel: Any = forward_kernel
_backward_kernel: Any = backward_kernel


def site(
    config: HiLoMoEConfig,
    execution: Execution,
    x: Tensor,
    query: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    keys: Tensor | None,
) -> list[Tensor]:
    """As in `operators`, but keeping weighted and hidden values of all vectors."""
    x, q_NQ = _checked(x), _checked(x if query is None else query)
    keys_MQ = (down if keys is None else keys).flatten(0, -2)
    down, up = down.flatten(0, -2), up.flatten(0, -2)
    scaled_MQ = keys_MQ * q_NQ.shape[1] ** -0.5
    gram_MM = wide(scaled_MQ) @ wide(keys_MQ).t()
    (N, D), (M, Q), out, H = x.shape, keys_MQ.shape, len(weight), len(down)
    E, k = config.num_experts, config.top_k
    L, selected = M // E, config.query_update == "selected"
    scores_LEN, logsumexp_LN = gram_MM.new_empty(L, E, N), gram_MM.new_empty(L, N)
    gates_LkN = gram_MM.new_empty(L, k, N)
    chosen_LkN = torch.empty(L, k, N, dtype=torch.int64, device=x.device)
    hidden_NH, weighted_NH = x.new_empty(N, H), x.new_empty(N, H)
    y_NO = x.new_empty(N, out)
    if N:
        _forward_kernel[(triton.cdiv(N, ROWS),)](
            x, q_NQ, weight.contiguous(), bias, down.contiguous(), _scaled(up, config.alpha),
            scaled_MQ, gram_MM,
            y_NO, gram_MM.new_empty(N, M), hidden_NH, weighted_NH, scores_LEN,
            torch.empty_like(scores_LEN) if selected else scores_LEN, logsumexp_LN, gates_LkN,
            chosen_LkN, N, D, out, Q,
            **_sizes(config, L), HAS_BIAS=bias is not None, SELECTED=selected,
        )  # fmt: skip
    counts_LE = choice_counts(chosen_LkN, E).to(gram_MM.dtype)
    routed = (gates_LkN, chosen_LkN, scores_LEN, logsumexp_LN)
    return [y_NO, counts_LE, gram_MM, *routed, weighted_NH, hidden_NH]


def site_backward(
    config: HiLoMoEConfig,
    execution: Execution,
    grad_NO: Tensor,
    saved: Sequence[Tensor],
    loss_weights: Sequence[float] | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As in `operators`."""
    (x, query, weight, down, up, keys, counts_LE, gram_MM, _, chosen_LkN, scores_LEN, logsumexp_LN,
     weighted_NH, hidden_NH) = saved  # fmt: skip
    need_x, need_query, need_weight, need_bias = needs
    x, grad_NO = x.contiguous(), grad_NO.contiguous()
    q_NQ, keys_MQ = x if query is None else query, (down if keys is None else keys).flatten(0, -2)
    shapes, down, up = (down.shape, up.shape), down.flatten(0, -2), up.flatten(0, -2)
    (N, D), (M, Q), out = x.shape, keys_MQ.shape, len(weight)
    L, E = scores_LEN.shape[:2]
    loss = None
    if loss_weights is not None:
        assert counts_LE is not None
        loss = loss_gradients(counts_LE, N, config.top_k, loss_weights)
    scaled_MQ = keys_MQ * Q**-0.5
    grad_hidden_NH, direct_NM = torch.empty_like(hidden_NH), gram_MM.new_empty(N, M)
    grad_x = torch.empty_like(x) if need_x else None
    if N:
        _backward_kernel[(triton.cdiv(N, ROWS),)](
            grad_NO, weight.contiguous(), down.contiguous(), _scaled(up, config.alpha), scaled_MQ,
            gram_MM, hidden_NH, scores_LEN, logsumexp_LN, chosen_LkN,
            None if loss is None else loss.scores_LE.contiguous(),
            None if loss is None else _on_device(loss.z, gram_MM),
            gram_MM.new_empty(N, len(down)), grad_hidden_NH, direct_NM, grad_x, N, D, out,
            **_sizes(config, L), HAS_LOSS=loss is not None,
            SELECTED=config.query_update == "selected",
            STOP_SCORES=config.stop_gradient == "scores", NEEDS_X=need_x,
            THROUGH_QUERY=query is None and config.stop_gradient != "query",
        )  # fmt: skip
    direct = direct_NM.to(q_NQ.dtype)
    by_keys_MQ = _by_keys(direct_NM, scores_LEN, chosen_LkN, keys_MQ, config)
    by_keys_MQ = by_keys_MQ.to(q_NQ.dtype).addmm_(direct.t(), q_NQ) * Q**-0.5
    by_down = grad_hidden_NH.t() @ x
    none = grad_NO.new_empty(0)
    return [
        none if grad_x is None else grad_x,
        direct @ scaled_MQ if need_query else none,
        grad_NO.t() @ x if need_weight else none,
        grad_NO.sum(dim=0) if need_bias else none,
        (by_down + by_keys_MQ if keys is None else by_down).view(shapes[0]),
        _scaled(weighted_NH.t() @ grad_NO, config.alpha).view(shapes[1]),
        none if keys is None else by_keys_MQ.view(keys.shape),
    ]


def _by_keys(
    direct_NM: Tensor,
    scores_LEN: Tensor,
    chosen_LkN: Tensor,
    keys_MQ: Tensor,
    config: HiLoMoEConfig,
) -> Tensor:
    """The part of the keys' gradient that comes through their Gram matrix; not yet scaled."""
    passed_LEN = scores_LEN
    if config.query_update == "selected":
        is_chosen_LEN = torch.zeros_like(scores_LEN).scatter_(1, chosen_LkN, 1.0)
        passed_LEN = scores_LEN * is_chosen_LEN
    gram_MM = direct_NM.t() @ passed_LEN.flatten(0, 1).t()
    layer_M = torch.arange(len(gram_MM), device=gram_MM.device) // config.num_experts
    gram_MM = gram_MM * (layer_M.unsqueeze(1) > layer_M)  # a layer hears those before it
    return (gram_MM + gram_MM.t()) @ wide(keys_MQ)


def _on_device(number: Tensor | float, like: Tensor) -> Tensor:
    """One element; a number is filled in there, since a copy from the host would wait for it."""
    if isinstance(number, Tensor):
        return number.to(like.dtype).reshape(1)
    return like.new_full((1,), number)


def _checked(t: Tensor) -> Tensor:
    if t.dtype == torch.float64:
        raise ValueError(
            "HiLoMoEConfig.backend = 'triton' computes in float32 and below, got float64. "
            "Use backend='eager'."
        )
    return t.contiguous()


def _scaled(t: Tensor, alpha: float) -> Tensor:
    return t.contiguous() if alpha == 1 else t * alpha


def _sizes(config: HiLoMoEConfig, layers: int) -> dict[str, int]:
    experts = layers * config.num_experts

    def padded(size: int) -> int:
        return max(LEAST, 1 << (size - 1).bit_length())

    return {
        "L": layers,
        "E": config.num_experts,
        "R": config.rank,
        "K": config.top_k,
        "EP": padded(config.num_experts),
        "MP": padded(experts),
        "HP": padded(experts * config.rank),
        "BN": ROWS,
        "BD": WIDTH,
        "BO": WIDTH,
    }
