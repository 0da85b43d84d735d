"""A site's rows in one pass on a GPU: routing, gates, base map and experts, and the way back.

A program owns a block of rows. It multiplies them with all keys and down-vectors, runs the layers'
recursion over scores (`routing`), and then, tile by tile of the output, adds the chosen experts to
the base map's product while that is still in registers: the output is written once, and what the
experts add is never stored. Logits, hidden values and gates do pass through memory, a few numbers
a row that stay in the cache; each is read by the program that wrote it, after a barrier.

`fused` calls these kernels. Triton's interpreter runs them without a GPU (``TRITON_INTERPRET=1``).

Shape legend:
    N  rows     D  input width     O  output width    Q  query width
    L  expert layers     E  experts     R  rank     K  experts chosen
    M  experts of all layers, L E       H  their vectors, L E R
    A size with a P is padded to a power of two; BN, BD, BO are the sizes of tiles.
"""

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


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
