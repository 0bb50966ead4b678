"""The moments of activations and gradients that decompositions are made of, collected in one pass over the text.

Legend: T tokens, x [T, n] the inputs of a site, g [T, m] the gradient of the loss at a matrix's output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankwise.calibration.signal import frozen, sampled_loss, signal_of, token_mask
from rankwise.calibration.tokens import Batch
from rankwise.errors import RankwiseError


@dataclass
class Moments:
    """Sums over the tokens seen so far, all float64 on the model's device."""

    count: int = 0
    second: Tensor | None = None  # H = sum x x^T [n, n], of a site
    absolute: Tensor | None = None  # sum |x| [n], of a site
    output: Tensor | None = None  # G = sum g g^T [m, m], of a matrix
    fisher: Tensor | None = None  # sum over sequences and rows of (dL/dW)^2 [n], of a matrix
    first: Tensor | None = None  # sum x [n], of a site

    @property
    def mean(self) -> Tensor:
        """mu = E[x] [n]. Needs "first"."""
        assert self.first is not None
        return self.first / self.count

    @property
    def covariance(self) -> Tensor:
        """sum (x - mu)(x - mu)^T [n, n]. Needs "first" and "second"."""
        assert self.second is not None
        return self.second - self.count * torch.outer(self.mean, self.mean)

    def holds(self, needs: Collection[str]) -> bool:
        """Whether any token was seen, and every moment that `needs` names: not so where text or gradient did not reach."""
        return self.count > 0 and all(getattr(self, need) is not None for need in needs)


@dataclass(frozen=True)
class Statistics:
    """What calibration leaves behind. Matrices that read the same activations share one site's moments."""

    site_of: dict[str, str]  # matrix -> site, named after its first matrix
    sites: dict[str, Moments]
    matrices: dict[str, Moments] = field(default_factory=dict)

    def of(self, matrix: str) -> Moments:
        """The moments of a matrix: its site's and its own."""
        site, own = self.sites[self.site_of[matrix]], self.matrices.get(matrix, Moments())
        return Moments(site.count, site.second, site.absolute, own.output, own.fisher, site.first)

    def to_tensors(self) -> dict[str, Tensor]:
        """For the run folder: the matrices in order, and every moment under `kind/path/field`."""
        tensors = {}
        for number, (matrix, site) in enumerate(self.site_of.items()):
            text = json.dumps([matrix, site]).encode()
            tensors[f"site_of/{number:06d}"] = torch.tensor(list(text), dtype=torch.uint8)
        for kind, group in (("site", self.sites), ("matrix", self.matrices)):
            for path, moments in group.items():
                for name, value in vars(moments).items():
                    if value is not None:
                        tensors[f"{kind}/{path}/{name}"] = torch.as_tensor(value)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Statistics:
        """Undo `to_tensors`."""
        site_of = dict(json.loads(bytes(tensors[k].tolist())) for k in sorted(tensors) if k.startswith("site_of/"))
        groups: dict[str, dict[str, Moments]] = {"site": {}, "matrix": {}}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind in groups:
                path, _, name = rest.rpartition("/")
                moments = groups[kind].setdefault(path, Moments())
                setattr(moments, name, int(tensor) if name == "count" else tensor.to(device))
        return cls(site_of, groups["site"], groups["matrix"])


def find_sites(model: nn.Module, matrices: Collection[str], batch: Batch) -> dict[str, str]:
    """Matrix -> site, from one call on a single sequence: matrices handed the very same tensor share a site.

    A matrix that the sequence does not reach (an expert no token was routed to) is a site of its own.
    """
    probe = {name: tensor[:1] for name, tensor in batch.items()}
    seen: list[tuple[Tensor, str]] = []
    site_of: dict[str, str] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor, site in reversed(seen):
                if tensor is inputs[0]:
                    site_of[name] = site
                    return
            seen.append((inputs[0], name))
            site_of[name] = name

        return note

    with ExitStack() as stack, torch.no_grad():
        for name in matrices:
            stack.enter_context(_removed(model.get_submodule(name).register_forward_pre_hook(hook(name))))
        signal_of(model, probe)
    return {name: site_of.get(name, name) for name in matrices}


def collect(
    model: nn.Module,
    matrices: Collection[str],
    batches: list[Batch],
    needs: Collection[str],
    seed: int = 0,
) -> Statistics:
    """One pass over `batches`: forward, and backward too where `needs` has "output" or "fisher".

    needs: "second" for H, "first" for sum x, "absolute" for sum |x|, "output" for G, "fisher" for the squared weight
        gradients. Gradients are those of `sampled_loss` (true Fisher). Products are float32, sums float64.
    Raises `RankwiseError` where the model or an activation has values that are not finite.
    """
    backward = bool({"output", "fisher"} & set(needs))
    generator = torch.Generator().manual_seed(seed)
    with frozen(model), ExitStack() as stack:
        site_of = find_sites(model, matrices, batches[0])
        statistics = Statistics(site_of, {s: Moments() for s in site_of.values()}, {m: Moments() for m in matrices})
        state: dict[str, Tensor | None] = {"mask": None}
        for name in matrices:
            module = model.get_submodule(name)
            if site_of[name] == name:
                see = _input_hook(statistics.sites[name], state, needs)
                stack.enter_context(_removed(module.register_forward_pre_hook(see)))
            if backward:
                see_out = _output_hook(statistics.matrices[name], state, needs)
                stack.enter_context(_removed(module.register_forward_hook(see_out)))
        with torch.set_grad_enabled(backward):
            for batch in tqdm(batches, desc="calibrating"):
                state["mask"] = token_mask(batch)
                signal = signal_of(model, batch)
                if not torch.isfinite(signal.values).all():
                    raise RankwiseError("the model's outputs on the calibration text are not finite")
                if backward:
                    sampled_loss(signal, generator).backward()
    for path, moments in (*statistics.sites.items(), *statistics.matrices.items()):
        if not all(torch.isfinite(value).all() for value in vars(moments).values() if isinstance(value, Tensor)):
            raise RankwiseError(
                f"{path}: activations or gradients on the calibration text are not finite, or their squares are not"
            )
    return statistics


def _removed(handle: Any) -> Any:
    """A hook's handle as a context manager that removes the hook on leaving."""
    return handle


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """[..., n] -> float32 [T, n], padding left out where the layout shows it."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)].float()
    return x.reshape(-1, x.shape[-1]).float()


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.double() if total is None else total.add_(part)


def _input_hook(moments: Moments, state: Mapping[str, Tensor | None], needs: Collection[str]) -> Callable[..., None]:
    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = _tokens(inputs[0].detach(), state["mask"])
        moments.count += len(x)
        if "second" in needs:
            moments.second = _add(moments.second, x.T @ x)
        if "absolute" in needs:
            moments.absolute = _add(moments.absolute, x.abs().sum(0))
        if "first" in needs:
            moments.first = _add(moments.first, x.sum(0))

    return see


def _output_hook(moments: Moments, state: Mapping[str, Tensor | None], needs: Collection[str]) -> Callable[..., None]:
    def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)  # the graph begins at the first matrix: no weight asks for a gradient
        x = inputs[0].detach() if "fisher" in needs else None

        def see_gradient(gradient: Tensor) -> None:
            if "output" in needs:
                g = _tokens(gradient, state["mask"])
                moments.output = _add(moments.output, g.T @ g)
            if x is not None:
                moments.fisher = _add(moments.fisher, _squared_weight_gradients(x, gradient))

        output.register_hook(see_gradient)

    return see


def _squared_weight_gradients(x: Tensor, g: Tensor) -> Tensor:
    """Sum over sequences and output features of (dL/dW)^2: [n]. Inputs without a sequence axis count as one sequence."""
    x, g = (t.float() if t.ndim == 3 else t.reshape(1, -1, t.shape[-1]).float() for t in (x, g))
    return sum((gs.T @ xs).square().sum(0) for gs, xs in zip(g, x, strict=True))
