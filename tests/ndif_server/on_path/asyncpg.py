"""Stands in for PostgreSQL, so that ndif's own code checks keys: a table from the environment.

`NLA_LENS_TEST_KEYS` is JSON, `{key: [e-mail, [tag, ...]]}`. ndif has one query: a row a tag, or one
row without a tag.
"""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any


class _Connection:
    async def fetch(self, query: str, key: object) -> list[dict[str, Any]]:
        email, tags = json.loads(os.environ["NLA_LENS_TEST_KEYS"]).get(str(key), (None, None))
        if tags is None:
            return []
        return [{"user_id": 1, "email": email, "user_tag": tag} for tag in tags or (None,)]


class _Pool:
    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[_Connection]:
        yield _Connection()

    async def close(self) -> None:
        pass


async def create_pool(**options: object) -> _Pool:
    return _Pool()
