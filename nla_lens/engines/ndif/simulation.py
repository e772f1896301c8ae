"""nnsight's simulation of a server in this process."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.schema.request import RequestModel

from nla_lens.engines.ndif.patience import Traffic
from nla_lens.models.turns import turn


class SimulatedBackend(LocalSimulationBackend):
    """nnsight's simulation of a server in this process, with bytes counted.

    The model's weights are loaded here, as they would be there.
    """

    def __init__(self, model: Any, traffic: Traffic) -> None:
        super().__init__(model)
        self.traffic = traffic

    def __call__(self, tracer: Any) -> None:
        """Sends to itself, and runs."""
        # It hides modules of this process for a moment: not two at a time.
        with turn(SimulatedBackend):
            self.traffic.requests += 1
            self.traffic.sent += len(RequestModel.serialize(tracer, compress=True))
            super().__call__(tracer)
