"""Training of whatever the student's layers are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rankwise import distributed
from rankwise.calibration.tokens import Batch, cut, endless, parts_of, sequences_in, written
from rankwise.masks.student import Student, mean_gradient
from rankwise.progress import progress

T = TypeVar("T")


@dataclass(frozen=True)
class Descent:
    """Adam, its learning rate rising linearly over the first `warm_up` of the steps and then falling linearly to zero; every step
    reads `tokens`, or one sequence."""

    steps: int = 120
    learning_rate: float = 0.01
    tokens: int = 2048
    betas: tuple[float, float] = (0.9, 0.95)
    warm_up: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate at `step`, as a factor."""
        rise = self.warm_up * self.steps
        return (step + 1) / (rise + 1) if step < rise else 1 - (step - rise) / (self.steps - rise)


def own_parts(student: Student, tokens: int) -> list[list[Batch]]:
    """The training text in parts of about so many tokens, of each this process's sequences as the one batch of a list; none
    where there are more processes than sequences."""
    sequences = max(1, tokens // written(student.training[0])[0].numel())
    return [_own(part) for part in parts_of(student.training, sequences)]


def descend(
    student: Student,
    parts: Sequence[T],
    add_gradients: Callable[[T], tuple[float, int]],
    scales: Mapping[Tensor, float],
    options: Descent,
    what: str,
    losses: list[float],
) -> None:
    """Train parameters in place on the parts, in an order drawn from the student's seed. add_gradients: adds the gradients of the
    loss on a part to the parameters; the loss and its tokens. scales: each parameter -> what the learning rate is multiplied by
    for it. The loss of each step, per token, is added to `losses`; `what` is said of the progress."""
    groups = [{"params": [parameter], "lr": options.learning_rate * scale} for parameter, scale in scales.items()]
    on_cpu = all(parameter.device.type == "cpu" for parameter in scales)
    optimiser = torch.optim.Adam(groups, betas=options.betas, fused=on_cpu or None)
    batches = endless(parts, torch.Generator().manual_seed(student.seed))
    done = _restored(student.checkpoint.read(), optimiser, losses)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: options.rate(done + step))
    for _ in range(done):
        next(batches)
    with student.frozen(), student.together():
        bar = progress(range(done, options.steps), what)
        for _ in bar:
            own = add_gradients(next(batches))
            totals, tokens = zip(*distributed.everyones(own), strict=True)
            losses.append(sum(totals) / sum(tokens))
            for parameter in scales:
                _divide_gradient(parameter, sum(tokens))
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{losses[-1]:.5f}", refresh=False)
            student.checkpoint.write(lambda: _state(optimiser, losses))
    student.checkpoint.remove()


def _divide_gradient(parameter: Tensor, tokens: int) -> None:
    """Make the parameter's gradient one per token of all processes."""
    if distributed.size() == 1 and parameter.grad is not None:
        parameter.grad /= tokens  # in place: of all factors of a model float64 copies take longer than the step
    else:
        parameter.grad = mean_gradient(parameter, tokens).to(parameter)


def _state(optimiser: torch.optim.Optimizer, losses: list[float]) -> dict[str, Tensor]:
    """The parameters, Adam's means of each, and the loss of each step so far."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, (parameter, means) in enumerate(optimiser.state.items()):
        tensors |= {f"{number}": parameter.detach()} | {f"{number}.{name}": mean for name, mean in means.items()}
    return tensors


def _restored(state: dict[str, Tensor] | None, optimiser: torch.optim.Optimizer, losses: list[float]) -> int:
    """Put what `_state` has given in its place; the steps that were done."""
    if state is None:
        return 0
    losses += state["losses"].tolist()
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(state[f"{number}"])
            names = [name for name in state if name.startswith(f"{number}.")]
            means = {name.partition(".")[2]: state[name] for name in names}
            optimiser.state[parameter] = {n: mean if n == "step" else mean.to(parameter) for n, mean in means.items()}
    return len(state["losses"])


def _own(batch: Batch) -> list[Batch]:
    rank = distributed.rank()
    return [cut(batch, slice(rank, None, distributed.size()))] if rank < sequences_in(batch) else []
