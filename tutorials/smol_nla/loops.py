"""One training loop for both halves, which goes on where it was ended.

Under `torchrun` each process takes its share of every batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from halves import Reconstructor, Verbalizer, load_trained, trained_state
from tiny import Stepper, batches_by_length
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

LOG = logging.getLogger("smol_nla")
SAVED_EVERY = 20
"""Steps between two savings, and between two lines of the log."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training on one form of texts.

    Attributes:
        rows: Tokens of every text.
        samples: How many are trained on; the texts are gone through again where they are fewer.
    """

    rows: Sequence[Sequence[int]]
    samples: int


@dataclass(frozen=True)
class Loop:
    """How a half is trained.

    Attributes:
        name: Name for the log.
        batch: Rows per step.
        rate: Highest learning rate.
        flat: Share of the steps before it falls.
        seed: Seed of the order.
        bf16: Whether products are taken in bfloat16.
    """

    name: str
    batch: int
    rate: float
    flat: float
    seed: int
    bf16: bool


def plan(phases: Sequence[Phase], batch: int, seed: int) -> list[tuple[int, list[int]]]:
    """The batches of a whole run: the phase and the rows of each step."""
    steps = []
    for number, phase in enumerate(phases):
        lengths, own = [len(row) for row in phase.rows], []
        needed, epoch = -(-phase.samples // batch), 0
        while len(own) < needed:
            order = batches_by_length(lengths, batch, seed + 1000 * number + epoch)
            own.extend(index.tolist() for index in order)
            epoch += 1
        steps.extend((number, index) for index in own[:needed])
    return steps


def train(
    network: Verbalizer | Reconstructor,
    vectors_ND: torch.Tensor,
    phases: Sequence[Phase],
    loop: Loop,
    path: Path,
    stop: Callable[[int], bool] = lambda done: False,
) -> list[float]:
    """Trains a half in place, saving as it goes; what was saved before is gone on with.

    Args:
        network: The half.
        vectors_ND: One vector for each row of a phase.
        phases: The texts, in the order in which their forms are learned.
        loop: How.
        path: File of the state, kept when all is done.
        stop: Asked after each step whether to end early.

    Returns:
        The loss of each step.
    """
    steps = plan(phases, loop.batch, loop.seed)
    stepper = Stepper([network], loop.rate, len(steps), flat=loop.flat)
    losses: list[float] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        load_trained(network, state["trained"])
        stepper.optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]
        stepper.done = len(losses)
    device, begun, since = vectors_ND.device, time.monotonic(), len(losses)
    network.train()
    rank, world, shared = 0, 1, network
    if distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
        shared = DistributedDataParallel(network)
    for done in range(len(losses) + 1, len(steps) + 1):
        number, index = steps[done - 1]
        # A process is never left without a row.
        index = index[rank::world] or index[:1]
        rows = [phases[number].rows[i] for i in index]
        with torch.autocast(device.type, torch.bfloat16, enabled=loop.bf16):
            loss = shared(vectors_ND[index], rows)
        stepper.step(loss)
        losses.append(loss.item())
        ends = done == len(steps) or stop(done)
        if rank == 0 and (done % SAVED_EVERY == 0 or ends):
            _save(network, stepper, losses, path)
            recent = losses[-SAVED_EVERY:]
            pace = (done - since) * loop.batch / (time.monotonic() - begun)
            LOG.info(
                "%s %d/%d loss %.3f, %d samples, %.2f a second",
                *(loop.name, done, len(steps), sum(recent) / len(recent), done * loop.batch, pace),
            )
        if ends:
            break
    network.eval()
    return losses


def _save(
    network: Verbalizer | Reconstructor, stepper: Stepper, losses: list[float], path: Path
) -> None:
    state = {
        "trained": trained_state(network),
        "optimiser": stepper.optimiser.state_dict(),
        "losses": losses,
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)
