"""Codes on a trellis: the path of least error through `rankwise.layers.trellis`, by Viterbi's algorithm (Forney 1973). Where
later columns make up for earlier ones, they do so along each surviving path (Raheli, Polydoros and Tzou 1995)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.decomposition.grid import as_stored, refitted, unclipped_scale
from rankwise.layers.trellis import TRELLIS_GROUP, table_of, values

SIZES = torch.linspace(0.5, 1.4, 8)  # of a scale, relative to that which gives the largest weight the largest value


@dataclass(frozen=True)
class Trellis:
    """What a group of columns becomes: of every row the codes of a path, and a scale as stored in a unit."""

    bits: int
    unit: Tensor
    group = TRELLIS_GROUP
    in_order = True  # a code is read after those of the columns before it

    def values(self, codes: Tensor) -> Tensor:
        """What codes [columns, m] stand for, float32."""
        return values(codes.T.to(torch.int8), self.bits).T

    def first(self, group: Tensor, importance: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [columns, m] and scales [m] of a group [columns, m], whose later columns make up for the errors of earlier
        ones by `within` [columns, columns]; those of a column count by its importance."""
        table = table_of(self.bits, group)
        scales = unclipped_scale(group, 2.0 ** (self.bits - 1)).abs() * SIZES.to(group)[:, None]
        scales = as_stored(scales, self.unit)
        tried = group[:, None] / scales
        free = group.new_zeros(len(table) >> self.bits, scales.numel())
        costs = least_costs(tried.flatten(1), importance, table, self.bits, free)[-1].amin(0).view_as(scales)
        costs = (costs + torch.einsum("c,csm->sm", importance, tried.square_())) * scales.square()
        scale = scales.gather(0, costs.argmin(0, keepdim=True))[0]
        return compensated_path(group / scale, within, importance, table, self.bits), scale

    def again(self, target: Tensor, codes: Tensor, scale: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """Scales anew for a target [columns, m] in the metric H [columns, columns], and codes where others are better at
        them."""
        scale = refitted(scale, self.values(codes), target, H, self.unit)
        x, table = target / scale, table_of(self.bits, target)
        found = nearest_path(x, H.diagonal(), table, self.bits)
        before, after = (((H @ (E := x - self.values(each))) * E).sum(0) for each in (codes, found))
        return torch.where(after < before, found, codes), scale


def least_costs(x: Tensor, weights: Tensor, table: Tensor, bits: int, start: Tensor) -> Tensor:
    """The least sums [columns + 1, memories, m] of weights times v (v - 2 x), after so many columns of x [columns, m], over the
    paths of values v to each memory, from those before the first column, start [memories, m]."""
    codes, memories = 2**bits, len(start)
    costs = torch.cat([start[None], x.new_empty(len(x), *start.shape)])
    v = table[:, None]
    for before, after, row, weight in zip(costs, costs[1:], x, weights, strict=False):
        steps = torch.addcmul(weight * v.square(), weight * row, v, value=-2.0)
        steps.view(memories, codes, -1).add_(before[:, None])
        torch.amin(steps.view(codes, memories, -1), 0, out=after)
    return costs


def nearest_path(x: Tensor, weights: Tensor, table: Tensor, bits: int) -> Tensor:
    """The codes [columns, m], from -2^(bits-1) on, float32, of the path nearest to x [columns, m], columns weighted."""
    start, ring = _start(x, weights, table, bits)
    costs = least_costs(x, weights, table, bits, _only(start, table, bits))
    return _traced(costs, x, weights, table, bits, start if ring else costs[-1].argmin(0))[0]


def compensated_path(x: Tensor, within: Tensor, weights: Tensor, table: Tensor, bits: int) -> Tensor:
    """Those of a path whose errors E later columns of x make up for: x[j+1:] -= U[j, j+1:] E_j, for U = `within`
    [columns, columns], unit upper triangular."""
    codes, (start, ring) = 2**bits, _start(x, weights, table, bits)
    costs = _only(start, table, bits)
    memories = torch.arange(len(costs), device=x.device)[:, None]
    values, rest = table.view(-1, codes, 1), x.T.expand(len(costs), -1, -1)  # what is left of x for each memory
    states = torch.empty(len(x), *costs.shape, dtype=torch.long, device=x.device)
    for j, weight in enumerate(weights):
        left = rest[:, :, 0]
        steps = (left[:, None] - values).square_().mul_(weight).add_(costs[:, None])
        costs, high = steps.view(codes, *costs.shape).min(0)
        states[j] = high * len(costs) + memories
        before = states[j] >> bits
        E = left.gather(0, before) - table[states[j]]
        rest = rest[:, :, 1:].gather(0, before[:, :, None].expand(-1, -1, len(x) - 1 - j))
        rest.addcmul_(E[:, :, None], within[j, j + 1 :], value=-1)
    memory, found = start if ring else costs.argmin(0), torch.empty_like(x)
    for j in reversed(range(len(x))):
        state = states[j].gather(0, memory[None])[0]
        found[j] = (state & codes - 1) - codes // 2
        memory = state >> bits
    return found


def _start(x: Tensor, weights: Tensor, table: Tensor, bits: int) -> tuple[Tensor, bool]:
    """The memory [m] before the first column, and whether that is the one after the last, too: of a ring the memory there of the
    nearest path that is open at the other side."""
    if len(x) != TRELLIS_GROUP:
        return torch.zeros_like(x[0], dtype=torch.long), False
    half = len(x) // 2
    x, weights = x.roll(half, 0), weights.roll(half)
    costs = least_costs(x, weights, table, bits, x.new_zeros(len(table) >> bits, x.shape[1]))
    return _traced(costs, x, weights, table, bits, costs[-1].argmin(0))[1][half], True


def _only(memory: Tensor, table: Tensor, bits: int) -> Tensor:
    """The costs [memories, m] that allow no other memory [m]."""
    costs = torch.full((len(table) >> bits, len(memory)), torch.inf, dtype=table.dtype, device=memory.device)
    return costs.scatter_(0, memory[None], 0.0)


def _traced(costs: Tensor, x: Tensor, weights: Tensor, table: Tensor, bits: int, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [columns, m] of the paths of least costs to a memory [m] at the end, and the memories before them."""
    codes, found, memories = 2**bits, torch.empty_like(x), torch.empty_like(x, dtype=torch.long)
    earlier = torch.arange(codes, device=x.device)[:, None] * (len(table) // codes)
    for column in reversed(range(len(x))):
        states = earlier + memory
        v = table[states]
        cost = costs[column].gather(0, states >> bits) + weights[column] * v * (v - 2 * x[column])
        state = states.gather(0, cost.argmin(0, keepdim=True))[0]
        found[column] = (state & codes - 1) - codes // 2
        memory = memories[column] = state >> bits
    return found, memories
