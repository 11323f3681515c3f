"""Checks of the SDK and of the cards: pure functions of facts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qaic_ray import limits
from qaic_ray.doctor.facts import (
    DeviceNode,
    Finding,
    MachineFacts,
    SdkFacts,
    fail,
    ok,
    quickest_and_slow,
    warn,
)
from qaic_ray.limits import GIB, version_of
from qaic_ray.sdk import VENDOR_ROOT, Device, boards, qids_text

_TAG = re.compile(r"\.cpython-(\d)(\d+)")
_ANY = re.compile(r"\.abi3\.|\.py$")


def sdk_is_there(facts: MachineFacts) -> Iterator[Finding]:
    """An SDK folder with all that is used of it."""
    sdk = facts.sdk
    if sdk.error:
        yield fail(
            "SDK",
            sdk.error,
            f"Install the Platform and Apps SDK to {VENDOR_ROOT}, name their folder with --sdk or "
            "QAIC_RAY_SDK, or take the emulated one: --sdk emulated.",
        )
        return
    if sdk.broken:
        again = (
            f"remove {sdk.root}; it is laid down anew"
            if sdk.is_emulated
            else "install the Apps and Platform SDK again, as root"
        )
        yield fail(
            "SDK",
            f"{sdk.kind} SDK {sdk.apps} at {sdk.root} lacks {', '.join(sdk.broken)}.",
            f"{again[0].upper()}{again[1:]}.",
        )
        return
    what = " (no card is needed; its speed is this machine's)" if sdk.is_emulated else ""
    yield ok("SDK", f"{sdk.kind} SDK {sdk.apps} at {sdk.root}{what}")


def versions_fit(facts: MachineFacts) -> Iterator[Finding]:
    """Apps and Platform SDK of one release, and what that release takes."""
    sdk = facts.sdk
    if sdk.error:
        return
    apps, platform = version_of(sdk.apps), version_of(sdk.platform)
    if not platform:
        yield warn(
            "versions",
            f"Apps {sdk.apps}; the Platform SDK's version is not in versions/platform.xml.",
            f"Install the Platform SDK of the same release, {_release(apps)}.",
        )
    elif not limits.is_pair(apps, platform):
        yield warn(
            "versions",
            f"Apps {sdk.apps} on Platform {sdk.platform}: two releases that are not known to work "
            "together.",
            f"Install the Platform SDK {_release(apps)}, or the Apps SDK {_release(platform)}. On "
            "a DL2q instance leave the image's Platform SDK: others left its cards down.",
        )
    elif apps < limits.OLDEST_APPS:
        yield fail(
            "versions",
            f"Apps {sdk.apps}: its compiler knows no -retained-state, so no language model.",
            f"Install Apps {_release(limits.OLDEST_APPS)} or newer.",
        )
    else:
        yield ok("versions", f"Apps {sdk.apps}, Platform {sdk.platform}; takes {_takes(apps)}")


def _takes(apps: limits.Version) -> str:
    """What people have to know of a release before they export and compile for it."""
    if apps < limits.CACHE_INDEX_BEFORE:
        return "exports with --io cache-index"
    named = "named" if apps >= limits.NAMED_SPECIALIZATIONS_FROM else "flat"
    return f"exports with --io position-ids or cache-index, {named} specializations"


def _release(version: limits.Version) -> str:
    return ".".join(map(str, version[:2]))


def python_fits(facts: MachineFacts) -> Iterator[Finding]:
    """The Python that runs here against the one that the SDK's `qaicrt` was built for."""
    sdk = facts.sdk
    if sdk.error:
        return
    if not sdk.bindings:
        yield fail(
            "Python",
            f"There is no qaicrt module in {sdk.root}/dev/lib.",
            "Install the Apps SDK again; without its dev folder programs can be compiled, not run.",
        )
        return
    wanted = [f"{m[1]}.{m[2]}" for name in sdk.bindings if (m := _TAG.search(name))]
    here = ".".join(facts.python.split(".")[:2])
    if here in wanted or any(map(_ANY.search, sdk.bindings)):
        yield ok("Python", f"{facts.python}, which qaicrt of this SDK takes")
    elif wanted:
        which = " or ".join(dict.fromkeys(wanted))
        yield fail(
            "Python",
            f"Python {facts.python} runs here, and qaicrt of this SDK is for Python {which}.",
            _other_python([python for python in wanted if python in limits.PYTHONS], here),
        )
    else:
        yield warn(
            "Python",
            f"{sdk.bindings[0]} does not say which Python it is for; {facts.python} runs here.",
            f"Try it: PYTHONPATH={sdk.root}/dev/lib/x86_64 python -c 'import qaicrt'.",
        )


def _other_python(usable: list[str], here: str) -> str:
    if usable:
        return (
            f"Install qaic-ray with it: python{usable[0]} -m venv .venv; or an SDK whose qaicrt is "
            f"for {here}."
        )
    first, last = limits.PYTHONS[0], limits.PYTHONS[-1]
    return (
        f"qaic-ray runs on Python {first} to {last}: install an Apps SDK whose qaicrt is for one."
    )


def nodes_are_usable(facts: MachineFacts) -> Iterator[Finding]:
    """The driver's files in /dev, and whether this user may use them."""
    if facts.sdk.is_emulated:
        if not facts.cards.nodes and not facts.cards.on_bus:
            yield ok("device nodes", "none, and emulated cards need none")
            return
        yield warn(
            "device nodes",
            "This machine has cards, and the SDK that is used is the emulated one.",
            "Name the vendor's with --sdk real, or unset QAIC_RAY_SDK.",
        )
        return
    nodes = facts.cards.nodes
    if not nodes:
        if facts.cards.on_bus or not facts.sdk.error:
            yield _no_nodes(facts)
        return
    refused = [node for node in nodes if not node.usable]
    if refused:
        yield _refused(refused, facts)
        return
    yield ok("device nodes", f"{len(nodes)}, {nodes[0].path} and on; this user may use them")


def _no_nodes(facts: MachineFacts) -> Finding:
    if facts.cards.parameters is None:
        on_bus = f"{facts.cards.on_bus} on the PCI bus" if facts.cards.on_bus else "none on the bus"
        return fail(
            "device nodes",
            f"The driver is not loaded, so there is no device in /dev (cards: {on_bus}).",
            "Run `sudo modprobe qaic`; if there is no such module, install the Platform SDK. In a "
            "container give --device /dev/accel.",
        )
    return fail(
        "device nodes",
        "The driver is loaded and made no device in /dev.",
        "See `sudo dmesg | grep qaic` for why; in a container give --device /dev/accel.",
    )


def _refused(nodes: list[DeviceNode], facts: MachineFacts) -> Finding:
    group = nodes[0].group
    remedy = f"Run `sudo usermod -aG {group} $USER`, then log in again."
    if group in facts.cards.in_group:
        remedy = f"This user is in the group {group}, this login is older: log in again."
    return fail(
        "device nodes",
        f"This user may not use {nodes[0].path}{_more(len(nodes))}; they are the group {group}'s.",
        remedy,
    )


def _more(number: int) -> str:
    return f" and {number - 1} more" if number > 1 else ""


def cards_are_ready(facts: MachineFacts) -> Iterator[Finding]:
    """Every card that should be there is, and is ready."""
    cards, sdk = facts.cards, facts.sdk
    if sdk.error:
        return
    if cards.error:
        yield fail(
            "cards",
            cards.error,
            f"Run `{sdk.root}/tools/qaic-util -q` by hand, and see `sudo dmesg | grep qaic`.",
        )
        return
    expected = _expected(facts)
    if not cards.devices and not expected:
        yield fail("cards", "There is no card.", "Look for it with `lspci -d 17cb:`.")
        return
    found = [*_missing(facts, expected)]
    for device in cards.devices:
        found += _of_card(device, sdk, cards.held.get(device.qid, ""))
    found += _of_boards(facts)
    yield from found
    if not found:
        kinds = ", ".join(dict.fromkeys(_kind(device) for device in cards.devices))
        yield ok("cards", f"{len(cards.devices)} ready: {kinds}{_boards_said(cards.devices)}")


def _expected(facts: MachineFacts) -> int:
    return facts.sdk.cards or max(facts.cards.on_bus, len(facts.cards.nodes))


def _missing(facts: MachineFacts, expected: int) -> Iterator[Finding]:
    there = len(facts.cards.devices)
    if there < expected:
        remedy = "See `sudo dmesg | grep qaic`; a cold restart of the machine brings most back."
        if facts.sdk.is_emulated:
            remedy = "QAIC_EMULATOR_FAULTS names a file with a fault `absent`: unset it."
        yield fail("cards", f"{expected} cards should be there, and {there} are.", remedy)


def _of_card(device: Device, sdk: SdkFacts, holder: str) -> Iterator[Finding]:
    label, util = f"card {device.qid}", f"{sdk.root}/tools/qaic-util"
    if not device.ready:
        is_starting = device.status.lower() == "initializing"
        remedy = (
            f"Reset it, with nothing else on it: `sudo {util} -s -p PCI`, where `{util} -q -d "
            f"{device.qid}` tells its PCI address."
        )
        yield (warn if is_starting else fail)(
            label,
            f"Its status is {device.status}.",
            "Wait a minute; then reset it as an error." if is_starting else remedy,
        )
        return
    limit = limits.card_limits(device.sku)
    if limit is not None and device.nsp_total < limit.nsps:
        yield warn(
            label,
            f"It has {device.nsp_total} NSPs, and a {limit.name} card has {limit.nsps}.",
            f"Compile for {device.nsp_total} NSPs at most, or use other cards.",
        )
    if device.nsp_free < device.nsp_total and not holder:
        yield warn(
            label,
            f"Someone whom qaic-ray does not know holds {device.nsp_total - device.nsp_free} of "
            f"its {device.nsp_total} NSPs.",
            "See who with `sudo fuser -v /dev/accel/*`, or leave this card out: --device-id.",
        )


def _of_boards(facts: MachineFacts) -> Iterator[Finding]:
    """Boards that show fewer SoCs than they have: a group of that many spreads over others."""
    for board in boards(facts.cards.devices):
        limit = limits.card_limits(board[0].sku)
        if limit is None or not board[0].board or len(board) >= limit.socs:
            continue
        qids = ", ".join(str(device.qid) for device in board)
        yield warn(
            f"board {board[0].board}",
            f"It shows {len(board)} of the {limit.socs} SoCs of an {limit.name} board: QID {qids}.",
            f"Reset the others, or see `sudo dmesg | grep qaic`; a group of {limit.socs} cards "
            "would be spread over boards until then, which is slower.",
        )


def _boards_said(devices: Sequence[Device]) -> str:
    """` on 2 boards (QID 0-3, 4-7)` where a board has several SoCs."""
    found = boards(devices)
    if all(len(board) == 1 for board in found):
        return ""
    peers = ", ".join(qids_text([device.qid for device in board]) for board in found)
    return f" on {len(found)} board{'s' if len(found) > 1 else ''} (QID {peers})"


def _kind(device: Device) -> str:
    limit = limits.card_limits(device.sku)
    name = limit.name if limit else device.sku
    return f"{name} of {device.nsp_total} NSPs and {device.dram_total_bytes / GIB:.0f} GiB"


def cards_are_free(facts: MachineFacts) -> Iterator[Finding]:
    """Who holds cards now."""
    if facts.sdk.error or not facts.cards.devices:
        return
    held = facts.cards.held
    if held:
        who = "; ".join(f"{qid}: {name}" for qid, name in sorted(held.items()))
        yield warn("card locks", f"In use: {who}.", "Wait for its end, or run on other cards.")
    else:
        yield ok("card locks", "no card is held by a run")


def driver_waits(facts: MachineFacts) -> Iterator[Finding]:
    """The time-outs of the kernel module."""
    parameters = facts.cards.parameters
    if facts.sdk.is_emulated or parameters is None:
        return
    found = False
    for name, (_, least, what) in limits.DRIVER_TIMEOUTS.items():
        value = parameters.get(name)
        if value is not None and 0 < value < least:
            found = True
            yield warn(
                "driver time-outs",
                f"{name} is {value}: too short for {what} of a language model.",
                f"Run `echo {least} | sudo tee /sys/module/qaic/parameters/{name}`.",
            )
    if not found:
        said = ", ".join(f"{name} {value}" for name, value in sorted(parameters.items()))
        yield ok("driver time-outs", said or "the driver has no such parameters")


def cards_compute(facts: MachineFacts) -> Iterator[Finding]:
    """Every card gives the known answer, in its time; where cards were tried."""
    trials, util = facts.cards.trials, f"{facts.sdk.root}/tools/qaic-util"
    if facts.cards.trial_error:
        yield fail(
            "card trial",
            facts.cards.trial_error,
            "The SDK's compiler must make a program of one addition: install the SDK again.",
        )
        return
    right = [trial for trial in trials if trial.outcome == "right"]
    least_s, slow = quickest_and_slow(trials)
    for trial in trials:
        label = f"card {trial.qid}"
        if trial.outcome == "busy":
            yield warn(label, f"Not tried. {trial.says}", "Try it when nobody holds it.")
        elif trial.outcome != "right":
            yield fail(
                label,
                f"It failed a program with a known answer. {trial.says}",
                f"Leave it out (--device-id), reset it (`sudo {util} -s -p PCI`), and try again.",
            )
        elif trial in slow:
            yield warn(
                label,
                f"It is slow: {trial.run_s * 1000:.1f} ms an execution, the quickest card "
                f"{least_s * 1000:.1f}.",
                f"See its temperature and clocks: `{util} -q -d {trial.qid}`.",
            )
    if right and len(right) == len(trials):
        yield ok("card trial", f"{len(right)} cards gave the known answer")


CHECKS = (
    sdk_is_there,
    versions_fit,
    python_fits,
    nodes_are_usable,
    cards_are_ready,
    cards_are_free,
    driver_waits,
    cards_compute,
)
