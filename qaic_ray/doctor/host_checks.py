"""Checks of a machine's Ray, ports, disks, memory and clock: pure functions of facts."""

from __future__ import annotations

from collections.abc import Iterator

from qaic_ray import limits
from qaic_ray.doctor.facts import Finding, MachineFacts, fail, ok, warn
from qaic_ray.limits import GIB, version_of

RAY_PROCESSES = ("gcs_server", "raylet", "ray::", "python", "ray-dashboard", "ray")
"""What listens on a port of Ray's when it is Ray."""

LEAST_DISK_BYTES = 1 * GIB
LITTLE_DISK_BYTES = 10 * GIB
FULL = 0.95
"""Ray stops taking objects on a disk that is fuller than this."""
SHM_BYTES = 320 * 2**20
"""The object store of a Ray of ours, and room for the rest."""
SHM = "shared memory"
LEAST_MEMORY_BYTES = 2 * GIB
LITTLE_MEMORY_BYTES = 8 * GIB
PROCESS_BYTES = 130 * 2**20
"""Of the process that holds one card, before its tokenizer."""
OLDEST_TIME_S = 1_735_689_600.0
"""2025-01-01: a clock before that was never set."""


def ray_fits(facts: MachineFacts) -> Iterator[Finding]:
    """The version of Ray."""
    version = version_of(facts.ray.version)
    least = ".".join(map(str, limits.RAY_FROM))
    if not version:
        yield fail("Ray", "Ray cannot be imported.", f"pip install 'ray[default]>={least}'.")
    elif version < limits.RAY_FROM:
        yield fail(
            "Ray",
            f"Ray {facts.ray.version} is older than {least}.",
            f"pip install 'ray[default]>={least}'.",
        )
    elif version[:2] > limits.RAY_TESTED:
        tested = ".".join(map(str, limits.RAY_TESTED))
        yield warn(
            "Ray",
            f"Ray {facts.ray.version} is newer than {tested}, with which qaic-ray was tested.",
            f"If a run does not start: pip install 'ray[default]=={tested}.*'.",
        )
    else:
        yield ok("Ray", facts.ray.version)


def auth_is_closed(facts: MachineFacts) -> Iterator[Finding]:
    """Who can get into a Ray of this machine."""
    ray = facts.ray
    if not ray.version:
        return
    if ray.token_is_open:
        yield warn(
            "Ray's token",
            f"{ray.token_file} can be read by every user of this machine.",
            f"Run `chmod 600 {ray.token_file}`.",
        )
    mode = ray.auth_mode or "by Ray's default"
    if ray.auth_mode == "disabled":
        yield warn(
            "Ray's auth",
            "RAY_AUTH_MODE is disabled: whoever reaches a port of Ray runs code here.",
            "Unset it, unless the network is closed and other nodes have no token.",
        )
    elif ray.auth_mode == "token" and not ray.token_file:
        yield warn(
            "Ray's auth",
            "RAY_AUTH_MODE is token and there is no token in ~/.ray/auth_token: a cluster that "
            "runs will refuse this machine. Runs without --address make their own.",
            "Copy ~/.ray/auth_token from the cluster's head, or set RAY_AUTH_TOKEN.",
        )
    else:
        token = "with a token" if ray.token_file else "no token of the user's"
        yield ok("Ray's auth", f"{mode}, {token}; runs without --address make their own token")


def ports_are_free(facts: MachineFacts) -> Iterator[Finding]:
    """The ports that a head of Ray takes."""
    strangers = [
        port
        for port in facts.ports
        if port.is_taken and port.owner and not port.owner.startswith(RAY_PROCESSES)
    ]
    for port in strangers:
        yield warn(
            "ports",
            f"{port.owner} listens on {port.number}, which is {port.purpose}.",
            f"Start a head with another one: `ray start --head {_option(port.number)}`. Runs "
            "without --address choose free ports.",
        )
    if facts.ports and not strangers:
        said = [f"{port.number} {_state(port.is_taken, port.owner)}" for port in facts.ports]
        yield ok("ports", ", ".join(said))


def _option(number: int) -> str:
    return {6379: "--port=6380", 8265: "--dashboard-port=8266"}.get(
        number, "--ray-client-server-port=10002"
    )


def _state(is_taken: bool, owner: str) -> str:
    return f"in use by {owner or 'another user'}" if is_taken else "free"


def disks_have_room(facts: MachineFacts) -> Iterator[Finding]:
    """Room where runs, QPCs, the cache and Ray write."""
    found = False
    for disk in facts.disks:
        free, total = disk.free_bytes, disk.total_bytes
        where = f"{disk.path} ({disk.purpose})"
        if disk.error:
            found = True
            yield fail(
                "disk", f"{where} cannot be written: {disk.error}.", _elsewhere(disk.purpose)
            )
        elif disk.purpose == SHM:
            if total < SHM_BYTES:
                found = True
                yield warn(
                    "disk",
                    f"{where} has {total / 2**20:.0f} MiB, and a Ray of ours takes 256.",
                    "In a container give --shm-size=2g.",
                )
        elif free < LEAST_DISK_BYTES or (total and 1 - free / total > FULL):
            found = True
            bad = fail if free < LEAST_DISK_BYTES else warn
            yield bad(
                "disk",
                f"{where} is {1 - free / total:.0%} full: {free / GIB:.1f} GiB are free."
                if total
                else f"{where} is full.",
                f"Make room; Ray stops at {FULL:.0%}. {_elsewhere(disk.purpose)}",
            )
        elif free < LITTLE_DISK_BYTES:
            found = True
            yield warn(
                "disk",
                f"{where} has {free / GIB:.1f} GiB free: too little for the programs of a 7B "
                "model.",
                _elsewhere(disk.purpose),
            )
    if facts.disks and not found:
        least = min((d for d in facts.disks if d.purpose != SHM), key=lambda d: d.free_bytes)
        yield ok("disk", f"at least {least.free_bytes / GIB:.0f} GiB free ({least.path})")


def _elsewhere(purpose: str) -> str:
    return {
        "cache": "Let QAIC_RAY_CACHE name a folder on another disk.",
        "Ray": "Let TMPDIR name a folder on another disk.",
    }.get(purpose, "Run from a folder on another disk.")


def memory_suffices(facts: MachineFacts) -> Iterator[Finding]:
    """The host's memory, for the processes of all its cards."""
    total, free = facts.memory_bytes, facts.free_memory_bytes
    if not total:
        return
    needed = LEAST_MEMORY_BYTES + PROCESS_BYTES * len(facts.cards.devices)
    says = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    if free < needed:
        yield warn(
            "memory",
            f"{says}; Ray and {len(facts.cards.devices)} cards take {needed / GIB:.1f}.",
            "End other programs, or run on fewer cards: --device-id.",
        )
    elif free < LITTLE_MEMORY_BYTES:
        yield warn(
            "memory",
            f"{says}: enough to run, little to compile with.",
            "Compile fewer at once, --jobs 1, or on a larger machine.",
        )
    else:
        yield ok("memory", says)


def clock_is_set(facts: MachineFacts) -> Iterator[Finding]:
    """The time of day."""
    if not facts.time_s:
        return
    remedy = "Run `sudo timedatectl set-ntp true`."
    if facts.time_s < OLDEST_TIME_S:
        yield fail("clock", "The clock was never set: it is before 2025.", remedy)
    elif facts.is_synced is False:
        yield warn("clock", "No server sets the clock, so those of nodes drift apart.", remedy)
    else:
        yield ok("clock", "set by a server" if facts.is_synced else "set")


CHECKS = (
    ray_fits,
    auth_is_closed,
    ports_are_free,
    disks_have_room,
    memory_suffices,
    clock_is_set,
)
