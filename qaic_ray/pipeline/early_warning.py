"""How a run is going, said after its first rows; and its early end where too many of them fail."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qaic_ray.errors import QaicRayError
from qaic_ray.runs.run_view import WARN_AFTER, RunFollower

if TYPE_CHECKING:
    from qaic_ray.dispatch.dispatcher import Command, Event
    from qaic_ray.pipeline.request import Listener
    from qaic_ray.runs.driver import Audience, Progress


class EarlyWarning:
    """Passes on to a watch what the driver tells, and looks at what came of it.

    Args:
        watch: of the run.
        listener: is told once how the run is going.
        stop_if_errors: the share of failed rows that ends the run; None for never.
    """

    def __init__(
        self, watch: RunFollower, listener: Listener, stop_if_errors: float | None = None
    ) -> None:
        self._watch = watch
        self._listener = listener
        self._stop_if_errors = stop_if_errors
        self._is_said = False

    def audience(self, others: Audience) -> Audience:
        """The run's audience, with this one in it, and with the listener's answers and tokens."""

        def on_event(change: Event | Command) -> None:
            others.on_event(change)
            self._watch.change(change)

        def on_progress(progress: Progress) -> None:
            others.on_progress(progress)
            self.counted(progress)

        return replace(
            others,
            on_event=on_event,
            on_progress=on_progress,
            on_saved=self._listener.saved,
            on_tokens=self._listener.generated,
        )

    def counted(self, progress: Progress) -> None:
        """How many rows there are, and how many are done; what ended them was told before.

        Raises:
            QaicRayError: too many rows failed; one sentence.
        """
        self._watch.counted(
            rows_read=progress.rows_read,
            rows_done=progress.rows_done,
            rows_failed=progress.rows_failed,
            exhausted=progress.input_exhausted,
        )
        self._look()

    def _look(self) -> None:
        """Say how the run is going, once; end it where too many rows failed."""
        num_ended, num_failed = self._watch.ended
        if num_ended < WARN_AFTER:
            return
        if not self._is_said:
            self._is_said = True
            view = self._watch.view()
            if view.rows_done != view.rows_total:
                self._listener.going(view)
        limit = self._stop_if_errors
        if limit is not None and num_failed >= limit * num_ended:
            raise QaicRayError(
                f"{num_failed:,} of {num_ended:,} rows failed, and --stop-if-errors ends a run at "
                f"{limit:.0%}"
            )
