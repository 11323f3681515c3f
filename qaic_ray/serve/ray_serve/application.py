"""A model served by Ray Serve: its application deployed, watched, drained and taken away."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from qaic_ray.cards.inventory import CARD_RESOURCE
from qaic_ray.cluster.connection import CARD_CPUS, first_line
from qaic_ray.errors import QaicRayError, UsageError
from qaic_ray.files.documents import user_path
from qaic_ray.options import ServeOptions
from qaic_ray.pipeline.local_cards import on_local_cards
from qaic_ray.pipeline.open_ray import open_ray
from qaic_ray.pipeline.request import Listener, SdkChoice
from qaic_ray.sdk import name_for_others
from qaic_ray.serve.http.keys import ApiKeys
from qaic_ray.serve.http.request_log import logging_to_stderr
from qaic_ray.serve.http.server import heard, listening_socket, run_in_loop
from qaic_ray.serve.ray_serve.batch_desk import BatchDesk, DeskPlan
from qaic_ray.serve.ray_serve.card_fleet import CardsPlan
from qaic_ray.serve.ray_serve.cards import CardsReplica
from qaic_ray.serve.ray_serve.cards_handle import node_address
from qaic_ray.serve.ray_serve.interface import Interface, InterfacePlan
from qaic_ray.serve.serving import Served, address_of, keys_of, with_defaults

ROUTER = "qaic_ray.serve.ray_serve.request_router:BeginningRouter"
QUEUED_PER_SLOT = 4
"""Prompts that a replica may have for each of its slots, running and queued; what comes then goes
to another one, or waits where the interface is until Ray Serve scales up."""
MAX_CONNECTIONS = 100_000
HEALTH_S = 5.0
"""Interval at which Ray Serve asks a replica for its health."""
LOOK_S = 2.0
"""Interval at which the application is looked at."""
ANSWER_S = 10.0
"""How long a replica of the interface may take to answer this process."""
POLL_S = 0.2
CARDS, INTERFACE, BATCHES = "Cards", "Interface", "Batches"

log = logging.getLogger("qaic_ray.serve")


def serve_on_ray(
    served: Served,
    sdk: SdkChoice,
    listener: Listener,
    *,
    on_ready: Callable[[str], None],
    log_json: bool = False,
) -> None:
    """Serve a model as an application of Ray Serve until a signal ends it, or another takes over.

    Args:
        served: what.
        sdk: whose cards.
        listener: who is told.
        on_ready: is called with the interface's address once the replicas are ready.
        log_json: whether lines of the log are objects of JSON.

    Raises:
        UsageError: for an address, keys, cards or a model that cannot be.
        QaicRayError: the application could not be deployed.
        ClusterLost: the Ray is gone.
    """
    options = served.options
    keys = keys_of(options)
    request, num_cards = on_local_cards(served.request, sdk, None, listener)
    request = with_defaults(request).absolute()
    folder = str(user_path(options.folder, "--folder").absolute())
    options = _with_port(options).model_copy(update={"folder": folder})
    served = replace(served, request=request, options=options)
    with ExitStack() as held:
        held.enter_context(logging_to_stderr(as_json=log_json))
        cluster = held.enter_context(
            open_ray(request.ray, num_cards, name=request.name, sdk=sdk.here, listener=listener)
        )
        held.enter_context(cluster.losses())
        plan = cards_plan(served, sdk, num_cards)
        listener.began("Ray Serve")
        application = held.enter_context(Application(served, plan, keys=keys))
        listener.ended("Ray Serve")
        on_ready(address_of(options.host, application.port))
        run_in_loop(application.watch())


def cards_plan(served: Served, sdk: SdkChoice, num_cards: int) -> CardsPlan:
    """What replicas of cards are made with.

    Args:
        served: what is served.
        sdk: whose cards.
        num_cards: those of this machine that share its CPUs; 0 for a cluster's.
    """
    run = served.request.run
    num_workers = num_cards * run.partitions // run.group_size
    share = (os.cpu_count() or 1) // num_workers if num_workers else 0
    return CardsPlan(
        request=served.request,
        num_cards=served.options.cards_per_replica,
        cpus=share or CARD_CPUS,
        sdk=str(sdk.here.root) if num_cards else name_for_others(sdk.name),
        emulated=sdk.emulated,
        kept_slots=served.options.kept_slots,
    )


class Application(AbstractContextManager["Application"]):
    """The application while this process stands for it: on leaving it is taken away.

    Attributes:
        port: of the proxies.

    Args:
        served: what.
        plan: of the replicas of cards.
        keys: who may ask.
    """

    def __init__(self, served: Served, plan: CardsPlan, *, keys: ApiKeys | None) -> None:
        self._name = served.request.name
        self._drain_s = served.options.drain_s
        self._is_ours = True
        self._deployed_by = secrets.token_hex(8)
        self._has_started_serve = _client() is None
        self.port = _start_serve(served.options)
        try:
            self._handle: DeploymentHandle = serve.run(
                _application(plan, InterfacePlan(served, keys, self._deployed_by)),
                name=self._name,
                route_prefix="/",
                logging_config={"enable_access_log": False},
            )
        except (RayServeException, RuntimeError, ValueError) as error:
            self.__exit__()
            raise QaicRayError(
                f"Ray Serve could not deploy the application ({first_line(error)}): its logs are "
                "in logs/serve of Ray's session."
            ) from error
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        """Take the application away; requests that run end first, for a while."""
        if self._is_ours:
            serve.delete(self._name)
            if self._has_started_serve:
                serve.shutdown()

    async def watch(self) -> None:
        """Wait for a signal, or until another process stands for the application; then drain.

        Raises:
            QaicRayError: the application is gone.
        """
        ending, at_once = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (at_once if ending.is_set() else ending).set()

        with heard(on_signal):
            while not ending.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(ending.wait(), LOOK_S)
                await asyncio.to_thread(self._look)
                if not self._is_ours:
                    log.warning("Another command serves %s from now on: this one ends.", self._name)
                    return
            until_s = time.monotonic() + self._drain_s
            while time.monotonic() < until_s and not at_once.is_set():
                if not await asyncio.to_thread(self.num_running, drain=True):
                    return
                await asyncio.sleep(POLL_S)

    def _look(self) -> None:
        found = serve.status().applications.get(self._name)
        if found is None or found.status is ApplicationStatus.DELETING:
            self._is_ours = False
            raise QaicRayError(f"Somebody has deleted the application {self._name} of Ray Serve.")
        with suppress(TimeoutError, RayError):  # of a replica that is made anew: asked again
            now = self._handle.deployed_by.remote().result(timeout_s=ANSWER_S)
            self._is_ours = now == self._deployed_by

    def num_running(self, *, drain: bool) -> int:
        """Requests that are being answered; with `drain` no more are taken from now on."""
        told = self._handle.broadcast("num_running", drain=drain)
        return sum(told.results(timeout_s=ANSWER_S))


def _application(plan: CardsPlan, interface_plan: InterfacePlan) -> serve.Application:
    served = interface_plan.served
    options = served.options
    scale: dict[str, Any] = {"num_replicas": _num_replicas(options)}
    if options.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": _num_replicas(options),
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": plan.slots,
            }
        }
    lasting = {
        "health_check_period_s": HEALTH_S,
        "graceful_shutdown_timeout_s": options.drain_s,
        "graceful_shutdown_wait_loop_s": POLL_S,
    }
    cards = serve.deployment(CardsReplica).options(
        name=CARDS,
        max_ongoing_requests=QUEUED_PER_SLOT * plan.slots,
        ray_actor_options={"num_cpus": 0, "resources": {CARD_RESOURCE: plan.num_cards}},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **scale,
        **lasting,
    )
    interface = serve.deployment(serve.ingress()(Interface)).options(
        name=INTERFACE,
        num_replicas=options.interface_replicas,
        # The app itself refuses what is too much, in the interface's words.
        max_ongoing_requests=MAX_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        **lasting,
    )
    desk = serve.deployment(BatchDesk).options(
        name=BATCHES,
        num_replicas=1,
        # Where the folder is: on the node of this process.
        ray_actor_options={"num_cpus": 0, "resources": {f"node:{node_address()}": 0.001}},
        **lasting,
    )
    answering = cards.bind(plan)
    batches = desk.bind(DeskPlan(served, plan.sdk, plan.emulated), answering)
    return interface.bind(interface_plan, answering, batches)


def _num_replicas(options: ServeOptions) -> int:
    """Replicas of cards to begin with.

    Raises:
        UsageError: the Ray has no cards for them, which Ray Serve would wait for.
    """
    offered = int(ray.cluster_resources().get(CARD_RESOURCE, 0))
    there = offered // options.cards_per_replica
    wanted = options.min_replicas
    if wanted is None:
        wanted = max(there, 1) if options.max_replicas is None else 1
    if wanted > there:
        raise UsageError(
            f"{wanted} replicas of {options.cards_per_replica} cards are asked for, and the Ray "
            f"offers {offered} cards: ask for fewer, by --min-replicas or --cards-per-replica."
        )
    if options.max_replicas is not None and options.max_replicas < wanted:
        raise UsageError(
            f"--max-replicas {options.max_replicas} is less than --min-replicas {wanted}."
        )
    return wanted


def _start_serve(options: ServeOptions) -> int:
    """Start Ray Serve where it is not up; the port of its proxies."""
    if _client() is None:
        serve.start(
            proxy_location="EveryNode", http_options={"host": options.host, "port": options.port}
        )
    client = _client()
    assert client is not None
    there = client.http_config
    if (there.host, there.port) != (options.host, options.port):
        log.warning(
            "Ray Serve is up already and listens at %s:%d: --host and --port are of a Ray Serve "
            "that is started.",
            there.host,
            there.port,
        )
    return int(there.port)


def _client() -> Any:
    """Of the Ray Serve that is up in this cluster; None where none is."""
    return _get_global_client(raise_if_no_controller_running=False)


def _with_port(options: ServeOptions) -> ServeOptions:
    """The options with a port that is free on this machine."""
    with listening_socket(options.host, options.port) as opened:
        return options.model_copy(update={"port": opened.getsockname()[1]})
