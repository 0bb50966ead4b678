"""Rounding a matrix so that later numbers make up for the errors of earlier ones, along rows and along columns.

Legend: W [m, n] the weight, H [n, n] and G [m, m] the damped second moments of its inputs and of its outputs' gradients,
E = W - W' what rounding leaves; sought is the least tr(G E H E^T).

Columns (GPTQ, Frantar et al. 2023, arXiv 2210.17323): with H^-1 = U^T D U, U unit upper triangular, what column j leaves is
made up for by those after it, W[:, j+1:] -= E_j U[j, j+1:]. Groups, and the columns of each, go from the largest
second moment to the smallest: what matters most has most columns left to make up for it. A scale is chosen when its group is
reached.
Again (Behdin et al. 2023, arXiv 2309.01885): a second pass gives every column the whole numbers that are best beside all the
others, and every group the scale that is best for its whole numbers.
Rows (Tseng et al. 2025, arXiv 2505.22988): with G = A^T D A, A unit lower triangular, a tile of rows I is rounded as if its
weight were W_I + A[I, :I] E[:I]. Neighbouring rows, which are alike, are of different tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.decomposition.grid import as_stored, best_scale, unit_of, whole_numbers
from rankwise.decomposition.solver import Root
from rankwise.layers.quantised import GROUP

INPUTS_DAMPING = 1e-2  # added to H, relative to its mean diagonal: errors are made up for with few bits too
OUTPUTS_DAMPING = 10.0  # to G: gradients of a sampled word per token say far less of a row than inputs say of a column
TILES = 4


class Compensation:
    """What the roots of H [n, n] and G [m, m] say of a weight [m, n], on its device. Rows do not look at each other without G,
    or with a diagonal one."""

    def __init__(self, inputs: Root, outputs: Root | None, W: Tensor) -> None:
        self.columns = Columns.of(inputs, W.device)
        self.tiles = [tuple(part.to(W.device) for part in tile) for tile in _tiles(outputs, len(W))]

    def rounded(self, W: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Whole numbers [m, n] int8 and scales [m, groups], in W's dtype, and their unit, of W [m, n] in so many bits."""
        weight, most = W.detach().float(), 2.0 ** (bits - 1)
        unit = unit_of(W.detach(), most)
        codes, E = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
        scales = weight.new_empty(len(W), len(self.columns.groups))
        for tile, earlier, A in self.tiles:
            target = weight[tile] + A @ E[earlier]
            numbers, sizes, rounded = self.columns.rounded(target.T, most, unit)
            codes[tile], scales[tile], E[tile] = numbers.T, sizes.T, weight[tile] - rounded.T
        return codes, scales.to(W.dtype), unit


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
    """The order [n] in which columns are rounded, the groups in it, the place of each group in the weight, and H, U [n, n]
    float32, in that order."""

    order: Tensor
    groups: list[slice]
    places: list[int]
    H: Tensor
    U: Tensor

    @classmethod
    def of(cls, inputs: Root, device: torch.device) -> Columns:
        """From the root of H, on a device."""
        H = _damped(inputs, INPUTS_DAMPING)
        importance = H.diagonal()
        parts = torch.arange(len(H), device=H.device).split(GROUP)
        places = sorted(range(len(parts)), key=lambda place: -float(importance[parts[place]].mean()))
        ordered = [parts[place][importance[parts[place]].argsort(descending=True, stable=True)] for place in places]
        order = torch.cat(ordered)
        H = H[order][:, order]
        U = torch.linalg.cholesky(torch.cholesky_inverse(_cholesky(H)), upper=True)
        U = U / U.diagonal()[:, None]
        return cls(order.to(device), _slices(ordered), places, H.float().to(device), U.float().to(device))

    def rounded(self, target: Tensor, most: float, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whole numbers [n, rows] int8, from -`most` to most - 1, scales [groups, rows] as stored in a unit,
        and their product [n, rows], both float32, for a target [n, rows]."""
        target = target[self.order]
        numbers, scales = self._one_by_one(target.clone(), most, unit)
        self._again(target, numbers, scales, most, unit)
        back, by_place = self.order.argsort(), torch.empty_like(scales)
        by_place[self.places] = scales
        return numbers[back].to(torch.int8), by_place, self._product(numbers, scales)[back]

    def _one_by_one(self, rest: Tensor, most: float, unit: Tensor) -> tuple[Tensor, Tensor]:
        """GPTQ. rest [n, rows]: the target, from which the errors of its columns are taken."""
        numbers, scales = torch.empty_like(rest), rest.new_empty(len(self.groups), rest.shape[1])
        for group, scale in zip(self.groups, scales, strict=True):
            scale.copy_(best_scale(rest[group], most, self.H.diagonal()[group], unit))
            block, within = rest[group].div_(scale), self.U[group, group]
            for j, column in enumerate(block):
                numbers[group.start + j] = whole_numbers(column, most)
                column -= numbers[group.start + j]
                block[j + 1 :].addcmul_(within[j, j + 1 :, None], column, value=-1)
            rest[group.stop :].addmm_(self.U[group, group.stop :].T, block.mul_(scale), alpha=-1)
        return numbers, scales

    def _again(self, target: Tensor, numbers: Tensor, scales: Tensor, most: float, unit: Tensor) -> None:
        """Every column anew beside all others, and the scale of each group after its columns, in place."""
        error = target - self._product(numbers, scales)
        for group, scale in zip(self.groups, scales, strict=True):
            block, within, weights = numbers[group], self.H[group, group], self.H.diagonal()[group, None]
            step, relative = (self.H[group] @ error).div_(weights).div_(scale), within / weights
            error[group] += block * scale
            for j, column in enumerate(block):
                change = column - whole_numbers(column + step[j], most)
                step.addcmul_(relative[:, j, None], change)
                column -= change
            curvature = (within @ block * block).sum(0)
            growth = torch.where(curvature > 0, (block * weights * step).sum(0) / curvature, 0.0)
            scale.copy_(as_stored(scale + scale * growth, unit))
            error[group] -= block * scale

    def _product(self, numbers: Tensor, scales: Tensor) -> Tensor:
        return torch.cat([numbers[group] * scale for group, scale in zip(self.groups, scales, strict=True)])


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
