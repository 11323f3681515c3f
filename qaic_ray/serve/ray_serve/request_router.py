"""The request router of the cards' deployment, as Ray Serve calls it."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from qaic_ray.serve.ray_serve.question import Question
from qaic_ray.serve.ray_serve.replica_choice import Candidate

SLOTS = "slots"
"""Of a replica's metadata: prompts that it answers side by side."""


class BeginningRouter(RequestRouter):  # type: ignore[misc]  # untyped
    """Sends a question to the replica that its `ReplicaChoice` names first, of those that take one.

    It runs in the process of the interface's replica, where questions still have their choice.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See `RequestRouter`: ranks of replicas, the best first."""
        question = _question(pending_request)
        if question is None or question.choice is None:
            return [candidate_replicas]
        # As documented for routers that consider every replica at once: wait before the next round.
        assert pending_request is not None
        pending_request.routing_context.should_backoff = True
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        known = self.replica_queue_len_cache
        candidates = [
            Candidate(
                name,
                slots=int(one.replica_metadata.get(SLOTS, 1)),
                load=known.get(one.replica_id) or 0,
            )
            for name, one in by_name.items()
        ]
        return [[by_name[name]] for name in question.choice.order(question.prompt, candidates)]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """See `RequestRouter`: a replica has taken the request."""
        question = _question(pending_request)
        if question is not None and question.choice is not None:
            question.choice.begin(replica_id.unique_id, question.prompt)


def _question(pending: PendingRequest | None) -> Question | None:
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, Question) else None
