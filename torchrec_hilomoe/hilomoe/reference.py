"""Slow, obvious definitions. Tests and benchmarks trust these and nothing else.

Plain loops over rows, layers and experts, in whatever dtype the tensors have; production code
never imports this file.

Shape legend:
    N  rows (tokens or samples)     D  input width     O  output width    Q  query width
    L  expert layers                E  experts         R  rank            k  experts chosen
    C  width of what a row is routed by, D unless a router is shared
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig

__all__ = [
    "BucketedRows",
    "Interaction",
    "Losses",
    "Output",
    "choose",
    "hilomoe_linear",
    "interaction",
    "losses",
    "paired_gain",
    "rms_norm",
]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a site computes from ``N`` rows, with everything on the way.

    Attributes:
        y_NO: The rows' outputs.
        logits_NLE: Logits of every layer.
        scores_NLE: Their softmax.
        gates_NLE: The scores of the chosen experts, zero elsewhere.
        chosen_NLE: True where a row chose an expert.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoELinear
        >>> config = HiLoMoEConfig(num_layers=2, num_experts=4)
        >>> site = HiLoMoELinear(8, 4, config).double()
        >>> x_ND = torch.randn(5, 8, dtype=torch.float64)
        >>> out = hilomoe_linear(x_ND, dict(site.named_parameters()), config)
        >>> out.scores_NLE.shape
        torch.Size([5, 2, 4])
    """

    y_NO: Tensor
    logits_NLE: Tensor
    scores_NLE: Tensor
    gates_NLE: Tensor
    chosen_NLE: Tensor


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The auxiliary losses of each layer, unweighted, and their weighted mean.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoELinear
        >>> config = HiLoMoEConfig(num_layers=2, num_experts=4)
        >>> site = HiLoMoELinear(8, 4, config).double()
        >>> x_ND = torch.randn(5, 8, dtype=torch.float64)
        >>> out = hilomoe_linear(x_ND, dict(site.named_parameters()), config)
        >>> found = losses(out, config)
        >>> bool(found.total > 0)
        True
    """

    balance_L: Tensor
    z_L: Tensor
    total: Tensor


def hilomoe_linear(
    x_ND: Tensor,
    params: Mapping[str, Tensor],
    config: HiLoMoEConfig,
    active_layers: int | None = None,
    chosen_NLE: Tensor | None = None,
    source_NC: Tensor | None = None,
) -> Output:
    """The equations of a site, one row and one expert at a time.

    Args:
        x_ND: Rows.
        params: The parameters of ``HiLoMoELinear`` by their names.
        config: The site's options.
        active_layers: Layers that compute; None means all.
        chosen_NLE: Experts to use instead of each row's best ones. In low precision near-ties may
            fall either way; with the choice given, what is left is a smooth function.
        source_NC: What each row is routed by, if not by itself: its sample's tensor, where sites
            share a router.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoELinear
        >>> config = HiLoMoEConfig(num_layers=2, num_experts=4)
        >>> site = HiLoMoELinear(8, 4, config).double()
        >>> x_ND = torch.randn(5, 8, dtype=torch.float64)
        >>> out = hilomoe_linear(x_ND, dict(site.named_parameters()), config)
        >>> torch.allclose(out.y_NO, site(x_ND))
        True
    """
    L = config.num_layers if active_layers is None else active_layers
    keys_LEQ = params["expert_in"].squeeze(2) if config.tie_keys else params["expert_keys"]
    rows: list[dict[str, Tensor]] = []
    for n, x_D in enumerate(x_ND):
        y_O = params["weight"] @ x_D
        if "bias" in params:
            y_O = y_O + params["bias"]
        source_C = x_D if source_NC is None else source_NC[n]
        q_Q = source_C.detach() if config.stop_gradient == "query" else source_C
        if config.query_dim is not None:
            q_Q = params["query_proj"] @ q_Q
        if config.query_norm:
            q_Q = rms_norm(q_Q)
        steps: dict[str, list[Tensor]] = {"logits": [], "scores": [], "gates": [], "chosen": []}
        for layer in range(L):
            K_EQ = keys_LEQ[layer]
            logits_E = torch.stack([q_Q @ k_Q for k_Q in K_EQ]) / math.sqrt(len(q_Q))
            scores_E = (logits_E - logits_E.max()).exp()
            scores_E = scores_E / scores_E.sum()
            given_E = None if chosen_NLE is None else chosen_NLE[n, layer]
            chosen_E = choose(logits_E, config.top_k) if given_E is None else given_E
            gates_E = torch.where(chosen_E, scores_E, torch.zeros_like(scores_E))
            for e in range(config.num_experts):
                for r in range(config.rank):
                    a_D = params["expert_in"][layer, e, r]
                    b_O = params["expert_out"][layer, e, r]
                    y_O = y_O + config.alpha * gates_E[e] * b_O * (a_D @ x_D)
            passed_E = scores_E if config.query_update == "soft" else gates_E
            if config.stop_gradient == "scores":
                passed_E = passed_E.detach()
            for p, k_Q in zip(passed_E, K_EQ, strict=True):
                q_Q = q_Q + p * k_Q
            for name, value in zip(steps, (logits_E, scores_E, gates_E, chosen_E), strict=True):
                steps[name].append(value)
        rows.append({"y": y_O, **{name: _stack(layers, x_D) for name, layers in steps.items()}})

    def column(name: str) -> Tensor:
        return torch.stack([row[name] for row in rows])

    return Output(
        y_NO=column("y"),
        logits_NLE=column("logits"),
        scores_NLE=column("scores"),
        gates_NLE=column("gates"),
        chosen_NLE=column("chosen"),
    )


def choose(logits_E: Tensor, k: int) -> Tensor:
    """Mark the ``k`` largest logits; of equal ones, the first.

    Softmax is strictly increasing, so the largest logits are the largest scores. They are compared
    before it, because rounding can make different logits equal scores.

    Example:
        >>> choose(torch.tensor([0.1, 2.0, 2.0, -1.0]), k=1)
        tensor([False,  True, False, False])
    """
    chosen_E = torch.zeros_like(logits_E, dtype=torch.bool)
    values = logits_E.tolist()
    for e in sorted(range(len(values)), key=lambda e: -values[e])[:k]:
        chosen_E[e] = True
    return chosen_E


def rms_norm(q_Q: Tensor) -> Tensor:
    """Divide by the root mean square, as ``torch.nn.functional.rms_norm`` does by default.

    Example:
        >>> round(rms_norm(torch.tensor([3.0, 4.0])).square().mean().item(), 4)
        1.0
    """
    wide = torch.float64 if q_Q.dtype == torch.float64 else torch.float32
    return q_Q / (q_Q.square().mean() + torch.finfo(wide).eps).sqrt()


def losses(out: Output, config: HiLoMoEConfig) -> Losses:
    """The auxiliary losses over all rows of ``out``, which must be the global batch.

    Example:
        >>> from torchrec_hilomoe.hilomoe import HiLoMoELinear
        >>> config = HiLoMoEConfig(num_layers=2, num_experts=4)
        >>> site = HiLoMoELinear(8, 4, config).double()
        >>> x_ND = torch.randn(5, 8, dtype=torch.float64)
        >>> out = hilomoe_linear(x_ND, dict(site.named_parameters()), config)
        >>> losses(out, config).balance_L.shape
        torch.Size([2])
    """
    N, L, E = out.scores_NLE.shape
    balances, zs = [], []
    for layer in range(L):
        balance = torch.zeros((), dtype=out.scores_NLE.dtype)
        for e in range(E):
            share = out.chosen_NLE[:, layer, e].to(balance.dtype).sum() / N
            balance = balance + share * out.scores_NLE[:, layer, e].sum() / N
        balances.append(balance * E / config.top_k)
        z = torch.zeros((), dtype=out.scores_NLE.dtype)
        for n in range(N):
            z = z + torch.logsumexp(out.logits_NLE[n, layer], dim=0) ** 2
        zs.append(z / N)
    balance_L, z_L = torch.stack(balances), torch.stack(zs)
    total = (config.balance_weight * balance_L + config.z_weight * z_L).sum() / L
    return Losses(balance_L=balance_L, z_L=z_L, total=total)


def _stack(layers: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(layers) if layers else like.new_zeros(0)


@dataclass(frozen=True, kw_only=True)
class BucketedRows:
    """Rows of a site of a plain model, in buckets.

    Attributes:
        x_ND: Inputs.
        delta_NO: The gradient of each row's own loss by the site's output.
        weight_N: Weights of the rows.
        bucket_N: The bucket of each row.

    Example:
        >>> rows = BucketedRows(
        ...     x_ND=torch.randn(8, 3),
        ...     delta_NO=torch.randn(8, 2),
        ...     weight_N=torch.ones(8),
        ...     bucket_N=torch.arange(8) % 4,
        ... )
        >>> len(rows.bucket_N)
        8
    """

    x_ND: Tensor
    delta_NO: Tensor
    weight_N: Tensor
    bucket_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """What experts would gain if they were routed by these buckets.

    Attributes:
        slope: ``a``, by how much the held-out loss falls along the step at first.
        size: ``b``, by how much it bends.
        gain: ``a |a| / 2 b``, nats a row; 0 where ``b`` is.

    Example:
        >>> Interaction(slope=0.2, size=2.0, gain=0.01).gain
        0.01
    """

    slope: float
    size: float
    gain: float


def interaction(
    fit: BucketedRows, held_out: BucketedRows, num_experts: int, rank: int
) -> Interaction:
    """Fit the step that experts would take to some rows, and judge it by others.

    Args:
        fit: Rows that define the step, and the metric.
        held_out: Rows that judge it.
        num_experts: Number of buckets.
        rank: Outer products of the step in each bucket.

    Example:
        >>> x_ND = torch.randn(512, 3, dtype=torch.float64)
        >>> bucket_N = torch.arange(512) % 2
        >>> noise_NO = torch.randn(512, 2, dtype=torch.float64)
        >>> delta_NO = noise_NO + x_ND[:, :2] * (1 - 2 * bucket_N)[:, None]
        >>> rows = BucketedRows(
        ...     x_ND=x_ND, delta_NO=delta_NO, weight_N=torch.ones(512), bucket_N=bucket_N
        ... )
        >>> interaction(rows, rows, num_experts=2, rank=1).gain > 0.05
        True
    """
    left_OO, right_DD = _whitening([fit])
    fitted, judged = (_between(rows, num_experts) for rows in (fit, held_out))
    shares = _shares(held_out, num_experts)
    slope = size = 0.0
    for e in range(num_experts):
        u, sizes, v = torch.linalg.svd(left_OO @ fitted[e] @ right_DD)
        step_OD = torch.zeros_like(fitted[e])
        for r in range(min(rank, len(sizes))):
            step_OD = step_OD + sizes[r] * torch.outer(u[:, r], v[r])
        slope += shares[e] * float((step_OD * (left_OO @ judged[e] @ right_DD)).sum())
        size += shares[e] * float((step_OD * step_OD).sum())
    return Interaction(
        slope=slope, size=size, gain=slope * abs(slope) / (2 * size) if size > 0 else 0.0
    )


def paired_gain(blocks: Sequence[BucketedRows], num_experts: int) -> float:
    """Half the squared norm of what buckets want to change, whitened, without the rows' noise.

    Args:
        blocks: Blocks of rows, each compared with each other; all of them define the metric.
        num_experts: Number of buckets.

    Example:
        >>> def block():
        ...     x_ND, bucket_N = torch.randn(64, 3, dtype=torch.float64), torch.arange(64) % 2
        ...     delta_NO = torch.randn(64, 2).double() + x_ND[:, :2] * (1 - 2 * bucket_N)[:, None]
        ...     weight_N = torch.ones(64)
        ...     return BucketedRows(
        ...         x_ND=x_ND, delta_NO=delta_NO, weight_N=weight_N, bucket_N=bucket_N
        ...     )
        >>> paired_gain([block() for _ in range(4)], num_experts=2) > 0.05
        True
    """
    left_OO, right_DD = _whitening(blocks)
    differences = [_between(block, num_experts) for block in blocks]
    weights = [
        [share * float(block.weight_N.sum()) for share in _shares(block, num_experts)]
        for block in blocks
    ]
    total = sum(float(block.weight_N.sum()) for block in blocks)
    gain = 0.0
    for e in range(num_experts):
        products = counted = 0.0
        for s, t in permutations(range(len(blocks)), 2):
            one, other = (left_OO @ differences[at][e] @ right_DD for at in (s, t))
            products += weights[s][e] * weights[t][e] * float((one * other).sum())
            counted += weights[s][e] * weights[t][e]
        if counted:
            gain += sum(weight[e] for weight in weights) / total * products / counted / 2
    return gain


def _whitening(blocks: Sequence[BucketedRows]) -> tuple[Tensor, Tensor]:
    """``G^(-1/2)`` and ``X^(-1/2)`` of rows."""
    total = sum(float(w) for block in blocks for w in block.weight_N)
    D, width = blocks[0].x_ND.shape[1], blocks[0].delta_NO.shape[1]
    mean_D, second_DD = blocks[0].x_ND.new_zeros(D), blocks[0].x_ND.new_zeros(D, D)
    gram_OO = blocks[0].x_ND.new_zeros(width, width)
    for block in blocks:
        for x_D, delta_O, w in zip(block.x_ND, block.delta_NO, block.weight_N, strict=True):
            mean_D = mean_D + w * x_D / total
            second_DD = second_DD + w * torch.outer(x_D, x_D) / total
            gram_OO = gram_OO + w * torch.outer(delta_O, delta_O) / total
    return _inverse_root(gram_OO), _inverse_root(second_DD - torch.outer(mean_D, mean_D))


def _shares(rows: BucketedRows, num_experts: int) -> list[float]:
    total = sum(float(w) for w in rows.weight_N)
    weights = [0.0] * num_experts
    for bucket, w in zip(rows.bucket_N, rows.weight_N, strict=True):
        weights[int(bucket)] += float(w)
    return [weight / total for weight in weights]


def _between(rows: BucketedRows, num_experts: int) -> list[Tensor]:
    """For each bucket, the covariance of gradient and input in it, less the mean over buckets."""
    inside = []
    for e in range(num_experts):
        mine = [n for n, bucket in enumerate(rows.bucket_N) if int(bucket) == e]
        weight = sum(float(rows.weight_N[n]) for n in mine)
        x_D, delta_O = torch.zeros_like(rows.x_ND[0]), torch.zeros_like(rows.delta_NO[0])
        product_OD = torch.outer(delta_O, x_D)
        for n in mine:
            share = rows.weight_N[n] / weight
            x_D = x_D + share * rows.x_ND[n]
            delta_O = delta_O + share * rows.delta_NO[n]
            product_OD = product_OD + share * torch.outer(rows.delta_NO[n], rows.x_ND[n])
        inside.append(product_OD - torch.outer(delta_O, x_D))
    shares = _shares(rows, num_experts)
    overall_OD = sum(p * c_OD for p, c_OD in zip(shares, inside, strict=True))
    return [
        c_OD - overall_OD if p > 0 else torch.zeros_like(c_OD)
        for p, c_OD in zip(shares, inside, strict=True)
    ]


def _inverse_root(matrix: Tensor, kept: float = 1e-3) -> Tensor:
    """On the eigenvectors whose eigenvalues are above a share of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    root = torch.zeros_like(matrix)
    for value, vector in zip(values, vectors.t(), strict=True):
        if value > kept * values[-1]:
            root = root + torch.outer(vector, vector) / value.sqrt()
    return root
