"""Ways of writing the matrices of a model in fewer numbers, as prototypes: what each family offers a group of matrices, and at
which squared error in the Kronecker norm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.allocation.offer import tail_of
from rankwise.calibration.batches import first_tokens
from rankwise.calibration.moments import Collected
from rankwise.decomposition import kronecker
from rankwise.decomposition.slicing import refit, slices_of
from rankwise.decomposition.solver import Root, decompose
from rankwise.layers.linear import dense_linear, weight_of
from rankwise.masks.student import Student

SIZES = 32  # of ranks that a matrix is offered at
BIT = 1 / 16  # of a number
GRID, ROUNDS = 4, 8  # blocks of BLAST along each side, and its rounds of least squares
ALONE = 512  # tokens that what is left out is measured on
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Way:
    """One way of writing some matrices: its numbers, its squared error, and the dense weights that it amounts to."""

    cost: float
    error: float
    weights: Callable[[], Weights]


@dataclass(frozen=True)
class Model:
    """A model of Llama's layout with its statistics."""

    student: Student
    statistics: Collected

    def weight(self, name: str) -> Tensor:
        return self.student.weight(name).detach().double()

    def left(self, name: str) -> Root:
        return kronecker.output_root(self.statistics.of(name))

    def right(self, name: str) -> Root:
        return kronecker.input_root(self.statistics.of(name))

    def missed(self, name: str, weight: Tensor) -> float:
        """The squared error of a weight [m, n] in the metric's norm."""
        difference = self.right(name).apply((self.weight(name) - weight).T).T
        return float(self.left(name).apply(difference).square().sum())

    def way(self, cost: float, weights: Callable[[], Weights]) -> Way:
        """With the error of the weights."""
        return Way(cost, sum(self.missed(name, weight) for name, weight in weights().items()), weights)

    def dense(self, *names: str) -> Way:
        return Way(sum(self.weight(name).numel() for name in names), 0.0, dict)

    def linears(self, weights: Weights) -> dict[str, nn.Module]:
        """Layers to swap in."""
        dtype = {name: weight_of(self.student.model.get_submodule(name)).dtype for name in weights}
        return {name: dense_linear(weight.to(dtype[name]), None, False) for name, weight in weights.items()}


def pairs(model: Model, names: Sequence[str]) -> list[Way]:
    """Two factors."""
    return one_basis(model, names, model.right(names[0]), pivots=False)


def pivoted(model: Model, names: Sequence[str]) -> list[Way]:
    """Rows that are kept, and combinations of them; where the matrices read the same, one above the other."""
    return one_basis(model, names, model.right(names[0]))


def shared_basis(model: Model, names: Sequence[str]) -> list[Way]:
    """Basis Sharing (arXiv 2410.03765): matrices of several blocks share a basis of the inputs of all."""
    moments = [model.right(name).metric for name in names]
    return one_basis(model, names, root_of(torch.stack(moments).mean(0)))


def one_basis(model: Model, names: Sequence[str], right: Root, pivots: bool = True) -> list[Way]:
    lefts = [model.left(name) for name in names]
    whitened = [left.apply(model.weight(name)) for left, name in zip(lefts, names, strict=True)]
    found = decompose(torch.cat(whitened), None, right)
    rows, (m, n) = [len(weight) for weight in whitened], (len(found.second), found.first.shape[1])

    def weights(rank: int) -> Weights:
        parts = (found.second[:, :rank].double() @ found.first[:rank].double()).split(rows)
        return {name: left.solve(part) for name, left, part in zip(names, lefts, parts, strict=True)}

    ways, tail = [model.dense(*names)], tail_of(found.spectrum)
    for rank in ranks_of(len(found.spectrum)):
        cost, write = rank * (m + n - rank * pivots), functools.partial(weights, rank)
        if cost < m * n:
            ways.append(model.way(cost, write) if len(names) > 1 else Way(cost, float(tail[rank]), write))
    return ways


def neurons(model: Model, names: Sequence[str]) -> list[Way]:
    """Fewer neurons of an MLP, as the package has it (MoDeGPT, arXiv 2408.09632)."""
    if len(names) == 1:
        return pivoted(model, names)
    down = next(name for name in names if leaf(name) == "down_proj")
    weight, second = model.weight(down), model.right(down).metric
    slices = slices_of(weight, model.left(down), second)

    def weights(size: int) -> Weights:
        kept, whole = slices.kept(size), torch.zeros_like(weight)
        whole[:, kept] = refit(weight, second, kept)
        return {down: whole}

    each = model.dense(*names).cost / weight.shape[1]
    sizes = zip(slices.sizes.tolist(), slices.errors.tolist(), strict=True)
    return [model.dense(*names), *(Way(size * each, error, functools.partial(weights, size)) for size, error in sizes)]


def narrower_values(model: Model, names: Sequence[str]) -> list[Way]:
    """Values of fewer numbers (MoDeGPT's third kind): for the heads that share values, v and o in the basis in which these matter
    one after the other; those of the block that matter least go, and o is refitted."""
    if len(names) == 1:
        return pivoted(model, names)
    v, o = sorted(names, key=lambda name: leaf(name) == "o_proj")
    config: Any = model.student.model.config
    groups = config.num_key_value_heads
    weight, second, metric = model.weight(o), model.right(o).metric, model.left(o).metric
    heads = torch.arange(weight.shape[1]).view(groups, config.num_attention_heads // groups, -1)  # [groups, heads, size]
    basis, price = torch.zeros_like(second), []
    for of_group in heads:
        root = torch.linalg.cholesky(torch.stack([second[at][:, at] for at in of_group]).mean(0))
        seen = torch.stack([weight[:, at].T @ metric @ weight[:, at] for at in of_group]).sum(0)
        values, vectors = torch.linalg.eigh(root.T @ seen @ root)
        price.append(values)
        for at in of_group:
            basis[at[:, None], at] = root @ vectors
    back = torch.linalg.inv(basis)
    order, size = torch.cat(price).argsort(descending=True), heads.shape[2]

    def weights(kept: int) -> Weights:
        columns = heads[order[:kept] // size, :, order[:kept] % size].flatten()
        return {o: refit(weight @ basis, back @ second @ back.T, columns) @ back[columns]}

    each = model.dense(v, o).cost / len(order)
    sizes = ranks_of(len(order))[:-1]
    return [model.dense(v, o), *(model.way(kept * each, functools.partial(weights, kept)) for kept in sizes)]


def ranks_for_blocks(model: Model, names: Sequence[str], grid: int = 2) -> list[Way]:
    """A rank for each block of a matrix (all alike: Monarch, arXiv 2204.00595), pivoted, bought at its own error."""
    (name,) = names
    weight = model.weight(name)
    m, n = (side // grid for side in weight.shape)
    lefts, rights = on_the_diagonal(model.left(name), grid), on_the_diagonal(model.right(name), grid)
    found = [
        [decompose(part, left, right) for part, right in zip(row.split(n, 1), rights, strict=True)]
        for row, left in zip(weight.split(m), lefts, strict=True)
    ]
    ranks = np.array(ranks_of(min(m, n)))
    costs = np.minimum(ranks * (m + n - ranks), m * n)
    errors = np.array([[tail_of(d.spectrum)[ranks] for d in row] for row in found])
    bought = {}
    for exchange in np.geomspace(1e-2, 1e2, SIZES) * errors.max() / costs.max():
        best = (errors + exchange * costs).argmin(-1)
        bought[int(costs[best].sum())] = ranks[best]

    def weights(best: Any) -> Weights:
        def near(d: Any, rank: int) -> Tensor:
            return d.second[:, :rank].double() @ d.first[:rank].double()

        rows = [torch.cat([near(*one) for one in zip(*row, strict=True)], 1) for row in zip(found, best.tolist(), strict=True)]
        return {name: torch.cat(rows)}

    ways = (model.way(cost, functools.partial(weights, best)) for cost, best in bought.items() if cost < weight.numel())
    return [model.dense(name), *ways]


def blast(model: Model, names: Sequence[str]) -> list[Way]:
    """BLAST (arXiv 2410.21262): U_i diag(s_ij) V_j^T, its factors by least squares in turns from the low rank of the whole, in
    the metric of the blocks on the diagonal."""
    (name,) = names
    weight = model.weight(name)
    m, n = weight.shape
    left = torch.block_diag(*(factor(root) for root in on_the_diagonal(model.left(name), GRID)))
    right = torch.block_diag(*(factor(root) for root in on_the_diagonal(model.right(name), GRID)))
    whitened = left.T @ weight @ right
    A = whitened.view(GRID, m // GRID, GRID, n // GRID).transpose(1, 2)  # [i, j, rows, columns]
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)

    def weights(rank: int) -> Weights:
        U = (u[:, :rank] * s[:rank].sqrt()).reshape(GRID, -1, rank)
        V = (v[:rank].T * s[:rank].sqrt()).reshape(GRID, -1, rank)
        S = torch.ones(GRID, GRID, rank, dtype=A.dtype)
        for _ in range(ROUNDS):
            of_V = V.mT @ V
            U = solved(torch.einsum("ijr,jrs,ijs->irs", S, of_V, S), torch.einsum("ijmn,jnr,ijr->imr", A, V, S))
            of_U = U.mT @ U
            V = solved(torch.einsum("ijr,irs,ijs->jrs", S, of_U, S), torch.einsum("ijmn,imr,ijr->jnr", A, U, S))
            both = of_U[:, None] * (V.mT @ V)
            S = solved(both, torch.einsum("ijmn,imr,jnr->ijr", A, U, V)[:, :, None])[:, :, 0]
        near = torch.einsum("imr,ijr,jnr->ijmn", U, S, V).transpose(1, 2).reshape(m, n)
        return {name: torch.linalg.solve(left.T, torch.linalg.solve(right, near, left=False))}

    most = m * n / (m + n + GRID**2)
    ranks = [int(most * part / 10) for part in range(3, 11)]
    return [model.dense(name), *(model.way(rank * (m + n + GRID**2), functools.partial(weights, rank)) for rank in ranks)]


def sparse_factors(model: Model, names: Sequence[str]) -> list[Way]:
    """ROCKET (arXiv 2602.11008): a basis, and of each row's coefficients those that matter most; the basis by least squares."""
    (name,) = names
    weight, right = model.weight(name), model.right(name)
    m, n = weight.shape
    whitened = right.apply(weight.T)
    basis = torch.linalg.svd(right.apply(model.left(name).apply(weight).T), full_matrices=False).U

    def weights(rank: int, nonzero: int) -> Weights:
        own = basis[:, :rank].T @ whitened
        least = own.abs().kthvalue(rank - nonzero + 1, dim=0).values
        own = own.where(own.abs() >= least, 0.0)
        return {name: right.solve(solved(own @ own.T, whitened @ own.T) @ own).T}

    ways = [model.dense(name)]
    for part in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        for times in (1.5, 2.0, 3.0):
            rank = min(int(part * m * n / (n + m / times + m * BIT)), n, m)
            cost = rank * n + m * int(rank / times) + rank * m * BIT
            ways.append(model.way(cost, functools.partial(weights, rank, int(rank / times))))
    return ways


def sparse(model: Model, names: Sequence[str]) -> list[Way]:
    """Weights left out one by one by their own errors (Wanda, arXiv 2306.11695, and the metric on outputs), a bit a place."""
    (name,) = names
    weight = model.weight(name)
    order = saliency(model, name).flatten().argsort(descending=True)

    def weights(kept: int) -> Weights:
        found = torch.zeros_like(weight).flatten()
        found[order[:kept]] = weight.flatten()[order[:kept]]
        return {name: found.view_as(weight)}

    counts = [int(part * weight.numel()) for part in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)]
    return [model.dense(name), *(model.way(kept + BIT * weight.numel(), functools.partial(weights, kept)) for kept in counts)]


def two_of_four(model: Model, names: Sequence[str]) -> list[Way]:
    """Two of four weights in a row, two bits for each of them, or all."""
    (name,) = names
    weight = model.weight(name)
    fours = saliency(model, name).view(len(weight), -1, 4)
    kept = (fours >= fours.kthvalue(3, dim=-1, keepdim=True).values).view_as(weight)
    return [model.dense(name), model.way((0.5 + BIT) * weight.numel(), lambda: {name: weight * kept})]


def saliency(model: Model, name: str) -> Tensor:
    sides = model.left(name).metric.diagonal()[:, None] * model.right(name).metric.diagonal()
    return model.weight(name).square() * sides


def left_out(model: Model, names: Sequence[str]) -> list[Way]:
    """The attention or the MLP of a block as a whole (ShortGPT, FoldGPT), at the KL that it costs alone."""
    last = next(name for name in names if leaf(name) in ("o_proj", "down_proj"))
    nothing = {last: torch.zeros_like(model.weight(last))}
    text = first_tokens(model.student.selection, ALONE)
    return [model.dense(*names), Way(0, model.student.cost(model.linears(nothing), text), lambda: nothing)]


def root_of(metric: Tensor) -> Root:
    """A root of a metric that is damped already."""
    return Root.of(metric, 1e-9)


def factor(root: Root) -> Tensor:
    """F [d, d] of a root."""
    return root.apply(torch.eye(len(root.scale), dtype=root.scale.dtype)).T


def on_the_diagonal(root: Root, grid: int) -> list[Root]:
    metric = root.metric
    size = len(metric) // grid
    return [root_of(metric[at : at + size, at : at + size]) for at in range(0, grid * size, size)]


def ranks_of(most: int) -> list[int]:
    return sorted({round(most * part / SIZES) for part in range(1, SIZES + 1)} - {0})


def solved(gram: Tensor, right: Tensor) -> Tensor:
    """X with X gram = right, for the last two sides; `gram` may be singular."""
    level = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.solve(gram + level * torch.eye(gram.shape[-1], dtype=gram.dtype), right, left=False)


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def block(name: str) -> int:
    return int(name.partition(".layers.")[2].partition(".")[0])
