"""An NDIF server: where it is, how patiently it is talked to, what has travelled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from nla_lens.engines.ndif.backend import NDIFBackend
from nla_lens.engines.ndif.errors import told
from nla_lens.engines.ndif.patience import Patience, Traffic
from nla_lens.engines.ndif.results import MOST_BYTES
from nla_lens.engines.ndif.simulation import SimulatedBackend
from nla_lens.engines.ndif.versions import described
from nla_lens.errors import NLAError
from nla_lens.foreign import scrub

LOCAL: Final = "local"
_BYTES_A_NUMBER: Final = 8
_BYTES_AROUND: Final = 1 << 20


@dataclass
class Server:
    """Where a half runs, and how it is talked to.

    Attributes:
        host: Address; "local" is nnsight's simulation, None what nnsight is configured for.
        blocking: Wait on an open connection; False asks for the result again and again, which a
            lost connection does not hurt.
        patience: How long to wait.
        traffic: What has travelled so far.
        most_bytes: Of a result, as it travels and unpacked.
    """

    host: str | None = None
    blocking: bool = True
    patience: Patience = field(default_factory=Patience)
    traffic: Traffic = field(default_factory=Traffic)
    most_bytes: int = MOST_BYTES

    @classmethod
    def named(cls, engine: str) -> Server:
        """From an engine's name, "ndif", "ndif:local" or "ndif:http://...".

        Raises:
            NLAError: Something else stands behind the colon.
        """
        host = engine.partition(":")[2] or None
        if host is not None and host != LOCAL and not host.startswith(("http://", "https://")):
            raise NLAError(
                f"engine={scrub(engine, None)!r:.80}: after the colon comes http://HOST:PORT, "
                "https://HOST or local"
            )
        if host is not None and (set("@?#") & set(host) or not host.isprintable()):
            raise NLAError(
                "engine=: an address is a host and a port; a key goes to `nnsight login`"
            )
        return cls(None if host is None else host.rstrip("/"))

    @property
    def address(self) -> str:
        """The host, nnsight's own where none is named."""
        return self.host or str(_api().HOST)

    @property
    def api_key(self) -> str | None:
        """nnsight's; it is kept nowhere else, and is in no repr."""
        key: str | None = _api().APIKEY
        return key

    def backend(self, model: Any, key: str, n_numbers: int) -> Any:
        """What runs one trace there, and takes no more than so many numbers back."""
        if self.host == LOCAL:
            return SimulatedBackend(model, self.traffic)
        return NDIFBackend(
            key,
            self.patience,
            self.traffic,
            host=self.host,
            env=model._remoteable_get_env(),
            poll_for_result=not self.blocking,
            most_bytes=min(self.most_bytes, n_numbers * _BYTES_A_NUMBER + _BYTES_AROUND),
        )

    def told(self, what: str) -> Any:
        """A context in which failures become an `NLARemoteError`."""
        return told(what, self.address, lambda: self.api_key, self._versions)

    def _versions(self) -> str:
        return described(self.address, self.patience.connect)


def _api() -> Any:
    from nnsight.schema.config import CONFIG

    return CONFIG.API
