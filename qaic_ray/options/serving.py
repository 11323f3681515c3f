"""The part of the option tree that says how a model is served. `qaic_ray.options` has it too."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qaic_ray.option_types import Count, PathText, PositiveInt, Section, Words, opt

SERVER = "The server"
LIMITS = "Limits of the server"
SCALE = "Ray Serve"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServeOptions(Section):
    """Where the OpenAI interface is, who may use it, and how much of it."""

    GROUP: ClassVar[str] = SERVER

    host: str = opt("127.0.0.1", "Address to listen at; 0.0.0.0 for every network of the machine.")
    port: int = opt(8000, "Port to listen at; 0 for a free one.", ge=0, le=65535, sample=9000)
    served_model_name: Words[str] = opt(
        (),
        "Name of the model for clients; may be repeated.",
        repeated=True,
        shown="the model's own",
        sample=["my-llama"],
    )
    folder: PathText = opt(
        "serving", "Folder that keeps files and batches, and goes on with them.", flag="--folder"
    )
    api_keys: PathText | None = opt(
        None,
        "File of API keys' digests, as `qaic-ray key` prints them.",
        metavar="FILE",
        sample="keys.txt",
    )
    no_auth: bool = opt(False, "Let everybody who reaches the address use it.")
    tool_form: Literal["auto", "llama3_json", "hermes", "mistral", "none"] = opt(
        "auto", "How the model writes tool calls; auto: by its chat template."
    )
    allow_unknown_fields: bool = opt(False, "Pass over fields of requests that nobody knows.")
    log_prompts: bool = opt(False, "Write prompts and answers to the log.")
    drain_s: Seconds = opt(
        60.0, "Seconds that requests may take to end after SIGTERM.", group=LIMITS
    )
    max_waiting: PositiveInt = opt(
        1024, "Prompts that may be open; requests beyond get 429.", group=LIMITS
    )
    max_per_key: PositiveInt = opt(256, "Requests of one key at once.", group=LIMITS)
    max_body_mib: PositiveInt = opt(16, "MiB of a request's body, but for files.", group=LIMITS)
    request_timeout_s: Seconds = opt(600.0, "Seconds that one request may take.", group=LIMITS)
    client_stall_s: Seconds = opt(
        60.0, "Seconds that a client may take to send its body, or to read on.", group=LIMITS
    )
    kept_slots: Count = opt(
        1, "Slots of each card that batches leave to other requests.", group=LIMITS
    )
    ray_serve: bool = opt(
        False, "Serve as an application of Ray Serve, with its proxies and replicas.", group=SCALE
    )
    min_replicas: PositiveInt | None = opt(
        None,
        "Replicas at least, each on its cards.",
        group=SCALE,
        shown="one, or all that there are cards for where no most is said",
        sample=2,
    )
    max_replicas: PositiveInt | None = opt(
        None, "Replicas at most, by load.", group=SCALE, shown="as many as at least", sample=4
    )
    cards_per_replica: PositiveInt = opt(1, "Cards of a replica, all of one node.", group=SCALE)
    interface_replicas: PositiveInt = opt(
        1, "Replicas of the interface, which hold no card.", group=SCALE
    )
    haproxy: bool = opt(
        False,
        "Have HAProxy take requests to the interface, in a Ray that is started here; its pages of "
        "counts (ports 8404 and 9101) are open to every network.",
        group=SCALE,
    )
