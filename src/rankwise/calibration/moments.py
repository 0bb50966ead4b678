"""The moments of activations and gradients that decompositions are made of, collected in one pass over the text.

Legend: T tokens, x [T, n] the inputs of a site, g [T, m] the gradient of the loss at a matrix's output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.calibration.signal import device_of, frozen, sampled_loss, signal_of, token_mask, with_draws
from rankwise.calibration.tokens import Batch, cut
from rankwise.errors import RankwiseError
from rankwise.layers.precision import exact, exact_device, is_finite
from rankwise.progress import progress
from rankwise.run_folder import tensors_named

GRADIENTS = frozenset({"output", "fisher"})  # the moments that take a backward pass
GRAM_BLOCK = 256  # columns of a product's block: the larger, the more of its upper half is computed for nothing


@dataclass
class Moments:
    """Sums over the tokens seen so far on the model's device, float64 but for G: it is the largest, and used only with a damping
    that is four orders above float32's rounding."""

    count: int = 0
    input: Tensor | None = None  # H = sum x x^T [n, n], of a site
    absolute: Tensor | None = None  # sum |x| [n], of a site
    output: Tensor | None = None  # G = sum g g^T [m, m] float32, of a matrix
    fisher: Tensor | None = None  # sum over sequences and rows of (dL/dW)^2 [n], of a matrix
    total: Tensor | None = None  # sum x [n], of a site

    @property
    def mean(self) -> Tensor:
        """mu = E[x] [n]. Needs "total"."""
        assert self.total is not None
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """sum (x - mu)(x - mu)^T [n, n]. Needs "total" and "input"."""
        assert self.input is not None
        return self.input - self.count * torch.outer(self.mean, self.mean)

    def holds(self, needs: Collection[str]) -> bool:
        """Whether every moment in `needs` was collected, from one token at least; text or gradients may not have reached it."""
        return self.count > 0 and all(getattr(self, need) is not None for need in needs)


class Collected(Protocol):
    """What was collected of matrices, wherever it is."""

    def of(self, matrix: str) -> Moments:
        """The moments of a matrix."""
        ...


@dataclass(frozen=True)
class Statistics:
    """What calibration leaves behind. Matrices that read the same activations share one site's moments."""

    site_of: dict[str, str]  # matrix -> site, named after its first matrix
    sites: dict[str, Moments]
    matrices: dict[str, Moments] = field(default_factory=dict)

    def of(self, matrix: str) -> Moments:
        """The moments of a matrix: its site's and its own."""
        site, own = self.sites[self.site_of[matrix]], self.matrices.get(matrix, Moments())
        return Moments(site.count, site.input, site.absolute, own.output, own.fisher, site.total)

    def refuse_not_finite(self) -> None:
        """Raises `RankwiseError` naming the first site or matrix with a moment that is not finite."""
        for path, moments in (*self.sites.items(), *self.matrices.items()):
            if not all(is_finite(value) for value in vars(moments).values() if isinstance(value, Tensor)):
                raise RankwiseError(
                    f"{path}: activations or gradients on the calibration text, or their squares, are "
                    "not finite: load the model as float32",
                )

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
                setattr(moments, name, int(tensor) if name == "count" else tensor.to(exact_device(device)))
        return cls(site_of, groups["site"], groups["matrix"])

    @staticmethod
    def names_of(site: str, matrix: str) -> set[str]:
        """The names that `to_tensors` gives to the moments of a matrix."""
        every = [moment.name for moment in fields(Moments)]
        return {f"{kind}/{path}/{name}" for kind, path in (("site", site), ("matrix", matrix)) for name in every}


@dataclass(frozen=True)
class KeptStatistics:
    """What calibration leaves behind, in a file: each matrix's is read when it is asked for. All together are more than the
    model."""

    file: Path
    site_of: dict[str, str]
    device: torch.device

    def of(self, matrix: str) -> Moments:
        """As of `Statistics`."""
        site = self.site_of[matrix]
        found = Statistics.from_tensors(tensors_named(self.file, Statistics.names_of(site, matrix)), self.device)
        return replace(found, site_of={matrix: site}).of(matrix)


def find_sites(model: nn.Module, matrices: Collection[str], call: Callable[[], object]) -> dict[str, str]:
    """Matrix -> site, from one `call` of the model on a single sequence: matrices handed the very same tensor share a site.

    A matrix that the sequence does not reach (an expert no token was routed to) is a site of its own.
    """
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
        call()
    return {name: site_of.get(name, name) for name in matrices}


def collect(
    model: nn.Module,
    matrices: Collection[str],
    batches: list[Batch],
    needs: Collection[str],
    seed: int = 0,
) -> Statistics:
    """One pass over `batches`: forward, and backward too where `needs` has "output" or "fisher".

    needs: "input" for H, "total" for sum x, "absolute" for sum |x|, "output" for G, "fisher" for the squared weight
        gradients. Gradients are those of `sampled_loss` (true Fisher). Products are float32, sums float64.
    Raises `RankwiseError` where the model or an activation has values that are not finite.
    """
    backward = bool(GRADIENTS & set(needs))
    probe = cut(batches[0], slice(1))
    with frozen(model), torch.set_grad_enabled(backward):
        site_of = find_sites(model, matrices, lambda: signal_of(model, probe))
        with watching(model, site_of, needs) as watched:
            for batch in progress(with_draws(batches, seed), "calibrating"):
                watched.expect(batch)
                signal = signal_of(model, batch)
                if not is_finite(signal.values):
                    raise RankwiseError(
                        "the model's outputs on the calibration text are not finite: load it as float32",
                    )
                if backward and signal.values.requires_grad:  # else the batch reaches none of the matrices
                    sampled_loss(signal, batch).backward()
    return watched.everyones(device_of(model))


@dataclass
class Watched:
    """What `watching` has seen so far, and the `token_mask` of the batch that comes next."""

    statistics: Statistics
    mask: Tensor | None = None

    def expect(self, batch: Batch) -> None:
        """This batch comes next."""
        self.mask = token_mask(batch)

    def everyones(self, device: torch.device) -> Statistics:
        """What all processes have seen. Raises `RankwiseError` where it is not finite."""
        for moments in (*self.statistics.sites.values(), *self.statistics.matrices.values()):
            _add_up(moments, device)
            for total in (moments.input, moments.output):
                if total is not None:
                    mirrored(total)
        self.statistics.refuse_not_finite()
        return self.statistics


@contextmanager
def watching(model: nn.Module, site_of: Mapping[str, str], needs: Collection[str]) -> Iterator[Watched]:
    """While inside, what the matrices in `site_of` read, and the gradients at their outputs, add up to the moments in `needs`."""
    matrices = list(site_of)
    watched = Watched(Statistics(dict(site_of), {s: Moments() for s in site_of.values()}, {m: Moments() for m in matrices}))
    with ExitStack() as stack:
        for name in matrices:
            module = model.get_submodule(name)
            if site_of[name] == name:
                see = _input_hook(watched.statistics.sites[name], watched, needs)
                stack.enter_context(_removed(module.register_forward_pre_hook(see)))
            if GRADIENTS & set(needs):
                see_out = _output_hook(watched.statistics.matrices[name], watched, needs)
                stack.enter_context(_removed(module.register_forward_hook(see_out)))
        yield watched


def _removed(handle: Any) -> Any:
    """A hook's handle as a context manager that removes the hook on leaving."""
    return handle


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """[..., n] -> float32 [T, n], padding left out where the layout shows it."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)].float()
    return x.reshape(-1, x.shape[-1]).float()


def add_gram(total: Tensor | None, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """total [n, n] (a new one in `dtype`) plus the blocks of x^T x, for x [T, n], on the diagonal and below; see `mirrored`."""
    if total is None:
        total = torch.zeros(x.shape[1], x.shape[1], dtype=dtype, device=exact_device(x.device))
    for i in range(0, len(total), GRAM_BLOCK):
        j = i + GRAM_BLOCK
        total[i:j, :j] += (x[:, i:j].T @ x[:, :j]).to(total.device)
    return total


def mirrored(total: Tensor) -> Tensor:
    """The whole of what `add_gram` has added up below the diagonal, in place."""
    for i in range(0, len(total), GRAM_BLOCK):
        total[:i, i : i + GRAM_BLOCK] = total[i : i + GRAM_BLOCK, :i].T
    return total


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return exact(part) if total is None else total.add_(part.to(total.device))


def _add_up(moments: Moments, device: torch.device) -> None:
    """The sums of all processes, also where this one has seen no token."""
    parts = distributed.everyones({name: getattr(value, "shape", value) for name, value in vars(moments).items()})
    moments.count = sum(part["count"] for part in parts)
    for name in [name for name in vars(moments) if name != "count"]:
        shape = next((part[name] for part in parts if part[name] is not None), None)
        if shape is not None and len(parts) > 1:
            own = getattr(moments, name)
            dtype = torch.float32 if name == "output" else torch.float64
            own = torch.zeros(shape, dtype=dtype, device=exact_device(device)) if own is None else own
            setattr(moments, name, distributed.add_up(own))


def _input_hook(moments: Moments, watched: Watched, needs: Collection[str]) -> Callable[..., None]:
    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = _tokens(inputs[0].detach(), watched.mask)
        moments.count += len(x)
        if "input" in needs:
            moments.input = add_gram(moments.input, x)
        if "absolute" in needs:
            moments.absolute = _add(moments.absolute, x.abs().sum(0))
        if "total" in needs:
            moments.total = _add(moments.total, x.sum(0))

    return see


def _output_hook(moments: Moments, watched: Watched, needs: Collection[str]) -> Callable[..., Tensor]:
    def see(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # the model chooses by it, as the indexers of sparse attention do: it has no gradient
            return output
        if not output.requires_grad:  # the graph begins at the first matrix, as no weight asks for a gradient,
            output = output.detach().requires_grad_(True).clone()  # and at a copy, which may be changed in place
        x = inputs[0].detach() if "fisher" in needs else None

        def see_gradient(gradient: Tensor) -> None:
            if "output" in needs:
                g = _tokens(gradient, watched.mask)
                moments.output = add_gram(moments.output, g, torch.float32)
            if x is not None:
                moments.fisher = _add(moments.fisher, _squared_weight_gradients(x, gradient))

        output.register_hook(see_gradient)
        return output

    return see


def _squared_weight_gradients(x: Tensor, g: Tensor) -> Tensor:
    """Sum over sequences and output features of (dL/dW)^2: [n]. Inputs without a sequence axis count as one sequence."""
    x, g = (t.float() if t.ndim == 3 else t.reshape(1, -1, t.shape[-1]).float() for t in (x, g))
    return sum((gs.T @ xs).square().sum(0) for gs, xs in zip(g, x, strict=True))
