"""Fewer hidden neurons: which of an MLP go first, and what its last matrix makes of those that stay.

Legend: W [m, n] the last matrix of an MLP, C = H + damping [n, n] the second moment of its inputs, the hidden neurons, and R R^T
the metric on outputs [m, m]; S the neurons that stay. The least error in the norm of both, and the weight that has it, are

    || R^T (W - W' E_S) C^(1/2) ||^2 = tr(T D^-1 T^T)        W' = W C[:, S] C[S, S]^-1

(Nystrom, MoDeGPT, Lin et al. 2025, arXiv 2408.09632). They go from size to size, each time those whose own error is least: neuron
j costs |t_j|^2 / P_jj, for P = C[S, S]^-1 and T = R^T W' (Optimal Brain Surgeon, Hassibi and Stork 1993, on whole columns). With
D = P[B, B] for the neurons B that go, T loses T_B D^-1 P[B], and P loses P[:, B] D^-1 P[B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.decomposition.solver import Root
from rankwise.layers.precision import exact

SIZES = 64  # of an MLP that are on offer
LEAST = 8  # of the sizes, from which on there is no smaller one
DENSE = 0.75  # of the neurons in the products that are still there: leaving gone ones out each time costs more than they do


@dataclass(frozen=True)
class Slices:
    """order [n]: the neurons, those that stay longest last. sizes [s] falling: how many stay, and errors [s]: the squared error
    of each in the metric's norm, float64."""

    order: Tensor
    sizes: Tensor
    errors: Tensor

    def kept(self, size: int) -> Tensor:
        """The neurons that stay, rising."""
        return self.order[len(self.order) - size :].sort().values


def slices_of(W: Tensor, left: Root | None, second: Tensor, multiple: int = 1) -> Slices:
    """The sizes of an MLP with the last matrix W [m, n]; `second` [n, n] float64 is C, `multiple` what sizes are multiples of."""
    T = exact(W.detach())
    T = T.clone() if left is None else left.apply(T)
    P = torch.cholesky_inverse(torch.linalg.cholesky(second))
    left_over, here, gone = torch.arange(len(P), device=P.device), torch.ones(len(P), dtype=torch.bool, device=P.device), []
    error = torch.zeros((), dtype=P.dtype, device=P.device)
    sizes, errors, before = sizes_of(len(P), multiple), [], len(P)
    for size in sizes:
        if before < DENSE * len(P):
            T, P, left_over, here = T[:, here], P[here][:, here], left_over[here], here[here]
        own = T.square().sum(0) / P.diagonal()
        B = own.where(here, torch.inf).topk(before - size, largest=False).indices
        rows, T_B = P[B], T[:, B]
        change = torch.linalg.solve(rows[:, B], torch.cat([rows, T_B.T], 1))
        error = error + (T_B.T * change[:, len(P) :]).sum()
        T.addmm_(T_B, change[:, : len(P)], alpha=-1)
        P.addmm_(rows.T, change[:, : len(P)], alpha=-1)
        here[B], before = False, size
        gone.append(left_over[B])
        errors.append(error)
    last = (T.square().sum(0) / P.diagonal())[here].argsort()
    return Slices(torch.cat([*gone, left_over[here][last]]).cpu(), torch.tensor(sizes), torch.stack(errors).cpu())


def sizes_of(width: int, multiple: int = 1) -> list[int]:
    """How many neurons may stay, falling, fewer than all."""
    step = max(1, round(width / SIZES / multiple)) * multiple
    return [size for size in range(width // step * step, 0, -step) if width // LEAST <= size < width]


def refit(W: Tensor, second: Tensor, kept: Tensor) -> Tensor:
    """W' [m, k] float64: what the last matrix makes of the neurons `kept` [k] to miss the others least."""
    W, kept = W.detach().to(second.device), kept.to(second.device)
    cross = second[kept] @ exact(W).T
    return torch.cholesky_solve(cross, torch.linalg.cholesky(second[kept][:, kept])).T
