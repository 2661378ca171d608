"""When Prefect may say "Cached": the ledger decides, the cache key carries its answer.

A Prefect cache hit never runs the task's body, so a stale hit must be impossible by the key alone. Each payment draws
a nonce that its ledger record keeps, and the key covers it: a record that is gone, expired or to be refreshed, or one
whose objects are gone, leads to a new nonce and hence to a key that no old result has.
"""

from __future__ import annotations

import hashlib
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext

from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.generation.engine import ledger_for
from prefect_ttapi.generation.runs import RunContext
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore

#: (task run, nonce) of the cache key computed last in this context: how the key reaches the task's body.
_LAST_NONCE: ContextVar[tuple[str, str] | None] = ContextVar("ttapi_last_nonce", default=None)


@dataclass
class RequestHash(CachePolicy):
    """The cache policy of the generate tasks: same API, store and request, and a ledger record that still counts.

    It composes with Prefect's other policies (`REQUEST_HASH + RUN_ID`). Looking up costs one read of the store and
    one existence check per image. Where the store can't be reached there is no key, and the task itself fails
    before anything is sent.
    """

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],  # noqa: ARG002 - the base class's signature
        **kwargs: Any,  # noqa: ARG002
    ) -> str | None:
        """Return the key of a task run; None where there can be none, and the task itself says why."""
        credentials, store = inputs.get("credentials"), inputs.get("store")
        if not isinstance(credentials, TTAPICredentials) or not isinstance(store, ImageStore):
            return None  # the task itself says what is wrong with its arguments
        try:
            request_hash = ImageRequest.model_validate(inputs["request"]).request_hash
        except ValueError:
            return None
        run = RunContext.current(task_ctx)
        ledger = ledger_for(credentials, store, run.run_id)
        record = ledger.look_up(request_hash, run.not_before_for(task_ctx))
        nonce = record.result_key or str(record.generation.created_at) if record else uuid.uuid4().hex
        _LAST_NONCE.set((str(task_ctx.task_run.id), nonce))
        named = "\n".join((credentials.api_origin, store.identity, request_hash, nonce))
        return "ttapi-" + hashlib.sha256(named.encode()).hexdigest()


REQUEST_HASH = RequestHash()


def nonce_of(task_ctx: TaskRunContext | None) -> str:
    """Return the nonce in this task run's cache key; a new one where no key was computed."""
    last = _LAST_NONCE.get()
    return last[1] if last and task_ctx and last[0] == str(task_ctx.task_run.id) else uuid.uuid4().hex
