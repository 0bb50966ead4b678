"""Rounding a matrix so that later numbers make up for the errors of earlier ones, along rows and along columns.

Legend: W [m, n] the weight, H [n, n] and G [m, m] the damped second moments of its inputs and of its outputs' gradients,
E = W - W' what rounding leaves; sought is the least tr(G E H E^T).

Columns (GPTQ, Frantar et al. 2023, arXiv 2210.17323): with H^-1 = U^T D U, U unit upper triangular, what column j leaves is
made up for by those after it, W[:, j+1:] -= E_j U[j, j+1:]. Groups, and the columns of each, go from the largest
second moment to the smallest: what matters most has most columns left to make up for it. A scale is chosen when its group is
reached.
Again (Behdin et al. 2023, arXiv 2309.01885): a second pass gives every group the codes and the scale that are best beside all
the others.
Rows (Tseng et al. 2025, arXiv 2505.22988): with G = A^T D A, A unit lower triangular, a tile of rows I is rounded as if its
weight were W_I + A[I, :I] E[:I]. Neighbouring rows, which are alike, are of different tiles.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rankwise.decomposition.solver import Root

INPUTS_DAMPING = 1e-2  # added to H, relative to its mean diagonal: errors are made up for with few bits too
OUTPUTS_DAMPING = 10.0  # to G: gradients of a sampled word per token say far less of a row than inputs say of a column
TILES = 4


class Alphabet(Protocol):
    """What a group of columns may become."""

    @property
    def unit(self) -> Tensor:
        """Of the scales [1]."""

    @property
    def group(self) -> int:
        """Columns of a group."""

    @property
    def in_order(self) -> bool:
        """Whether columns of a group must stay in their order."""

    def values(self, codes: Tensor) -> Tensor:
        """What codes [columns, m] stand for, float32."""

    def first(self, group: Tensor, importance: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [columns, m], float32, and scales [m] of a group [columns, m]. Errors of a column count by its importance
        [columns], and later columns may make up for them by `within` [columns, columns]."""

    def again(self, target: Tensor, codes: Tensor, scale: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """Better ones for a target [columns, m] in the metric H [columns, columns]."""


class Compensation:
    """What the roots of H [n, n] and G [m, m] say of a weight [m, n], on its device. Rows do not look at each other without G,
    or with a diagonal one."""

    def __init__(self, inputs: Root, outputs: Root | None, W: Tensor) -> None:
        self.columns = functools.cache(functools.partial(Columns.of, inputs, W.device))
        self.tiles = [tuple(part.to(W.device) for part in tile) for tile in _tiles(outputs, len(W))]

    def rounded(self, W: Tensor, alphabet: Alphabet) -> tuple[Tensor, Tensor]:
        """Codes [m, n] int8 and scales [m, groups], in W's dtype, of W [m, n]."""
        weight, columns = W.detach().float(), self.columns(alphabet.group, alphabet.in_order)
        codes, E = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
        scales = weight.new_empty(len(W), len(columns.groups))
        for tile, earlier, A in self.tiles:
            target = weight[tile] + A @ E[earlier]
            numbers, sizes, rounded = columns.rounded(target.T, alphabet)
            codes[tile], scales[tile], E[tile] = numbers.T, sizes.T, weight[tile] - rounded.T
        return codes, scales.to(W.dtype)


def _tiles(outputs: Root | None, m: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows [b] that do not wait for each other, the earlier ones [k], and what those tell them, A [b, k]."""
    if outputs is None or outputs.full is None:
        return [(torch.arange(m), torch.arange(0), torch.empty(m, 0))]
    rows = torch.arange(m, device=outputs.full.device)
    parts = [rows[tile::TILES] for tile in range(min(TILES, m))]
    order = torch.cat(parts)
    G = _damped(outputs, OUTPUTS_DAMPING)[order][:, order]
    upper = _cholesky(G.flip(0, 1)).flip(0, 1)  # G = upper upper^T
    A = (upper / upper.diagonal()).T.float()
    return [(order[tile], order[: tile.start], A[tile, : tile.start]) for tile in _slices(parts)]


@dataclass(frozen=True)
class Columns:
    """The order [n] in which columns are rounded, the groups in it, the place of each group in the weight, and in that order,
    in float32, H, U [n, n] and the inverse of each group's part of H."""

    order: Tensor
    groups: list[slice]
    places: list[int]
    H: Tensor
    U: Tensor
    inverses: list[Tensor]

    @classmethod
    def of(cls, inputs: Root, device: torch.device, size: int, in_order: bool) -> Columns:
        """From the root of H, on a device, for groups of this size."""
        H = _damped(inputs, INPUTS_DAMPING)
        importance = H.diagonal()
        parts = torch.arange(len(H), device=H.device).split(size)
        places = sorted(range(len(parts)), key=lambda place: -float(importance[parts[place]].mean()))
        ordered = [parts[place] for place in places]
        if not in_order:
            ordered = [part[importance[part].argsort(descending=True, stable=True)] for part in ordered]
        order, groups = torch.cat(ordered), _slices(ordered)
        H = H[order][:, order]
        U = torch.linalg.cholesky(torch.cholesky_inverse(_cholesky(H)), upper=True)
        U = U / U.diagonal()[:, None]
        inverses = [torch.cholesky_inverse(_cholesky(H[group, group])).float().to(device) for group in groups]
        return cls(order.to(device), groups, places, H.float().to(device), U.float().to(device), inverses)

    def rounded(self, target: Tensor, alphabet: Alphabet) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [n, rows] int8, scales [groups, rows], and what they stand for [n, rows], for a target [n, rows]."""
        target = target[self.order]
        codes, scales, product = self._one_by_one(target.clone(), alphabet)
        self._again(target, codes, scales, product, alphabet)
        back, by_place = self.order.argsort(), torch.empty_like(scales)
        by_place[self.places] = scales
        return codes[back].to(torch.int8), by_place, product[back]

    def _one_by_one(self, rest: Tensor, alphabet: Alphabet) -> tuple[Tensor, Tensor, Tensor]:
        """GPTQ. rest [n, rows]: the target, from which the errors of its columns are taken."""
        codes, product = torch.empty_like(rest), torch.empty_like(rest)
        scales = rest.new_empty(len(self.groups), rest.shape[1])
        for group, scale in zip(self.groups, scales, strict=True):
            within = self.U[group, group]
            codes[group], scale[:] = alphabet.first(rest[group], self.H.diagonal()[group], within)
            product[group] = alphabet.values(codes[group]) * scale
            left = rest[group] - product[group]
            errors = torch.linalg.solve_triangular(within.T, left, upper=False, unitriangular=True)
            rest[group.stop :].addmm_(self.U[group, group.stop :].T, errors, alpha=-1)
        return codes, scales, product

    def _again(self, target: Tensor, codes: Tensor, scales: Tensor, product: Tensor, alphabet: Alphabet) -> None:
        """Every group anew beside all others, in place."""
        error = target - product
        for group, scale, inverse in zip(self.groups, scales, self.inverses, strict=True):
            best = product[group] + inverse @ (self.H[group] @ error)
            codes[group], scale[:] = alphabet.again(best, codes[group], scale, self.H[group, group])
            error[group] += product[group]
            product[group] = alphabet.values(codes[group]) * scale
            error[group] -= product[group]


def _slices(parts: Sequence[Tensor]) -> list[slice]:
    """Where each part is when all stand one after another."""
    ends = itertools.accumulate(map(len, parts), initial=0)
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _damped(root: Root, damping: float) -> Tensor:
    metric = root.metric
    metric.diagonal().add_(damping * metric.diagonal().mean())
    return metric


def _cholesky(metric: Tensor) -> Tensor:
    """The lower triangular factor of a metric [d, d] that is positive definite but for rounding."""
    factor, failed = torch.linalg.cholesky_ex(metric)
    if failed:
        values, basis = torch.linalg.eigh(metric)
        floor = values.max() * torch.finfo(metric.dtype).eps * len(metric)
        factor = torch.linalg.cholesky((basis * values.clamp_min(floor)) @ basis.T)
    return factor
