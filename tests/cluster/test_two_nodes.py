"""Emulated cards over two nodes: found, shared out, in parts and groups, in error, hung, killed."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from byte_tokens import with_byte_tokenizer
from compiled_here import compile_here
from fake_worker import IMPATIENT, OF_SILENCE
from ray.cluster_utils import Cluster as Nodes

from qaic_ray.cards.inventory import Node, WorkerPlace, place
from qaic_ray.cluster.cluster import Cluster
from qaic_ray.compile.compiler import Variant
from qaic_ray.contract import Specializations
from qaic_ray.dispatch.policy import Policy
from qaic_ray.doctor.checks import of_cluster
from qaic_ray.doctor.facts import Verdict
from qaic_ray.doctor.probes import machine_facts
from qaic_ray.model.checkpoint import load_tokenizer, open_checkpoint
from qaic_ray.model.tokenizer import Tokenizer
from qaic_ray.option_types import Precision
from qaic_ray.options import EmulatorOptions, ExportOptions, Generation
from qaic_ray.pipeline.compile_step import open_folder
from qaic_ray.pipeline.doctor_step import node_facts
from qaic_ray.rows import Prompt, Row
from qaic_ray.runs.driver import Audience
from qaic_ray.runs.result import FleetResult
from qaic_ray.sampling_params import SamplingParams
from qaic_ray.timeouts import Timeouts
from qaic_ray.worker.worker import CardWorker, WorkerInfo, WorkerSpec

if TYPE_CHECKING:
    from one_ray import OneRay
    from tiny_qpcs import TinyQpcs

pytestmark = pytest.mark.cluster

NUM_TOKENS = 24
SLOW = {"kind": "slow", "factor": 10}
"""Slow enough that every card has opened before the work is done."""
EMULATED = EmulatorOptions(cards=4, sku="standard", apps_version="1.22")
QUIET = {"num_cpus": 2, "resources": {"QAIC": 2}, "object_store_memory": 100 * 2**20}
QUICK_TO_NOTICE = {
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
    "health_check_initial_delay_ms": 0,
}


@dataclass
class Fleet:
    """Two nodes with two of the four cards each."""

    cluster: Cluster
    nodes: Nodes
    tiny: TinyQpcs
    model: str
    tokenizer: Tokenizer
    faults: Path
    infos: list[WorkerInfo] = field(default_factory=list)

    def set_faults(self, *faults: dict[str, Any]) -> None:
        """For every process that opens a card from now on.

        The SDK's folder outlives the session and goes on counting for a file that it knows.
        """
        self.faults.write_text(json.dumps({"seed": secrets.randbits(32), "faults": faults}))

    def places(self, **options: Any) -> list[WorkerPlace]:
        return place(self.cluster.inventory(str(self.tiny.sdk.root), EMULATED), **options)

    def run(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[WorkerPlace],
        qpc: Path | None = None,
        *,
        policy: Policy = IMPATIENT,
        **audience: Callable[[Any], None],
    ) -> FleetResult:
        """Every row once, in order, and each the answer of transformers."""
        sampling = SamplingParams(max_tokens=NUM_TOKENS)
        specs = [
            WorkerSpec(
                qpc=str(qpc or self.tiny.qpc()),
                model=self.model,
                generation=Generation(sampling=sampling),
                **vars(where),
            )
            for where in places
        ]
        rows: list[Row] = []
        self.infos.clear()
        audience.setdefault("on_worker_ready", self.infos.append)
        result = self.cluster.run_prompts(
            prompts,
            specs,
            worker_class=CardWorker,
            policy=policy,
            audience=Audience(on_row=rows.append, **audience),
        )
        assert [row.index for row in rows] == [prompt.index for prompt in prompts]
        assert [row.error for row in rows if not row.ok] == []
        for row in rows:
            expected = self.tiny.reference(self.tokenizer.encode(row.prompt), NUM_TOKENS)
            assert list(row.token_ids) == expected
        return result


@pytest.fixture
def fleet(
    one_ray: OneRay, tiny: TinyQpcs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """No faults to begin with, and every card ready again after a test."""
    current = one_ray.use("two nodes", lambda: two_nodes(tiny, tmp_path_factory.mktemp("fleet")))
    current.set_faults()
    yield current
    util = tiny.sdk.root / "tools" / "qaic-util"
    subprocess.run([str(util), "-s"], check=True, capture_output=True)


@contextmanager
def two_nodes(tiny: TinyQpcs, folder: Path) -> Iterator[Fleet]:
    """A cluster that a user started."""
    model = with_byte_tokenizer(tiny.checkpoint, folder / "tiny")
    (folder / "faults.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("QAIC_EMULATOR_FAULTS", str(folder / "faults.json"))
        patch.setenv("QAIC_RAY_LOCKS", str(folder / "locks"))
        tiny.qpc()
        head = QUIET | {"include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
        nodes = Nodes(initialize_head=True, head_node_args=head)
        try:
            nodes.add_node(**QUIET)
            with Cluster(0, address=nodes.address, timeouts=Timeouts(steps_s=0.3)) as cluster:
                tokenizer = load_tokenizer(open_checkpoint(str(model), weights=False))
                yield Fleet(cluster, nodes, tiny, str(model), tokenizer, folder / "faults.json")
        finally:
            nodes.shutdown()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, f"Tell me about {i % 30}") for i in range(count)]


def test_cards_of_two_nodes_on_one_machine_are_each_used_once(fleet: Fleet) -> None:
    found = fleet.cluster.inventory(str(fleet.tiny.sdk.root), EMULATED)
    assert [len(node.devices) for node in found] == [4, 4]
    assert fleet.cluster.problems(found) == []
    places = place(found)
    assert sorted(where.device_ids for where in places) == [(0,), (1,), (2,), (3,)]
    assert sorted(where.node_id for where in places) == sorted(
        2 * [node.node.node_id for node in found]
    )
    fleet.set_faults(SLOW)
    result = fleet.run(prompts(100), places)
    assert result.ok
    assert {worker.name for worker in result.workers if worker.measurement.rows} == {
        f"card {i}" for i in range(4)
    }
    assert len({info.pid for info in fleet.infos}) == 4


def test_doctor_looks_at_every_node_and_at_all_of_them(fleet: Fleet, tmp_path: Path) -> None:
    sdk = str(fleet.tiny.sdk.root)
    here = machine_facts(sdk, EMULATED, tmp_path)
    nodes = node_facts(fleet.cluster, sdk, tmp_path)
    assert [node.facts is not None and len(node.facts.cards.devices) for node in nodes] == [4, 4]
    assert [node.shared for node in nodes] == ["seen", "seen"]
    for node in nodes:  # one machine: whatever the skew seems to be is the asking's own
        assert node.skew_s is not None
        assert abs(node.skew_s) <= node.skew_error_s + 0.01
    found = of_cluster(nodes, here, str(tmp_path))
    of_all = {one.check: one.verdict for one in found if not one.node}
    assert set(of_all.values()) == {Verdict.OK}
    assert of_all.keys() >= {"shared folder", "Ray of all nodes", "clocks of all nodes"}
    assert list(tmp_path.iterdir()) == []

    def elsewhere(node: Node) -> str:
        raise ValueError("no such thing")

    said = [answer for _, answer in fleet.cluster.each_node("fail", elsewhere, ())]
    assert said == ["the search failed there (no such thing)"] * 2


def test_parts_of_cards_and_who_wants_them_whole(fleet: Fleet) -> None:
    qpc = fleet.tiny.qpc(num_cores=7)
    places = fleet.places(devices=[0, 3], partitions=2, num_cores=7)
    used: list[dict[int, str]] = []

    def look(info: WorkerInfo) -> None:
        fleet.infos.append(info)
        if len(fleet.infos) == 4:
            found = fleet.cluster.inventory(str(fleet.tiny.sdk.root), EMULATED)[0]
            used.append(dict(found.held or {}))
            free = {device.qid: device.nsp_free for device in found.devices}
            assert free == {0: 0, 1: 14, 2: 14, 3: 0}

    fleet.set_faults(SLOW)
    result = fleet.run(prompts(100), places, qpc, on_worker_ready=look)
    assert [worker.name for worker in result.workers] == [
        "card 0 part 1/2, 7 NSPs",
        "card 0 part 2/2, 7 NSPs",
        "card 3 part 1/2, 7 NSPs",
        "card 3 part 2/2, 7 NSPs",
    ]
    (held,) = used
    assert set(held) == {0, 3}
    assert "(card 3 part 1/2, 7 NSPs) holds it since" in held[3]


def test_a_device_group_is_one_worker(fleet: Fleet, tmp_path: Path) -> None:
    tiny = fleet.tiny
    shapes = Specializations.build(batch_size=4, prompt_len=8, ctx_len=64, continuous=True)
    variant = Variant(
        open_folder(tiny.exported(ExportOptions(continuous_batching=True))).source,
        Precision.FP32,
        14,
        shapes,
    )
    (tmp_path / "specializations.json").write_text(
        shapes.to_json(named=tiny.sdk.named_specializations)
    )
    devices = [{"deviceId": i, "numCores": 14} for i in range(2)]
    partition = {
        "connections": [{"devices": [0, 1], "type": "p2p"}],
        "partitions": [{"name": "Partition0", "devices": devices}],
    }
    (tmp_path / "mdp.json").write_text(json.dumps(partition))
    argv = variant.argv(tiny.sdk, tmp_path / "specializations.json", tmp_path / "qpc")
    argv.append(f"-mdp-load-partition-config={tmp_path / 'mdp.json'}")
    compile_here(argv, tmp_path / "log")
    places = fleet.places(group_size=2)
    assert [where.name for where in places] == ["cards 0-1", "cards 2-3"]
    fleet.set_faults(SLOW | {"device": [0, 2]})  # each card of a group counts
    result = fleet.run(prompts(60), places, tmp_path / "qpc")
    assert result.ok
    # A busy machine may have one of them opened twice.
    assert {(info.name, info.device_ids) for info in fleet.infos} == {
        ("cards 0-1", (0, 1)),
        ("cards 2-3", (2, 3)),
    }


def test_a_card_that_turns_to_error_is_given_up_and_the_others_go_on(fleet: Fleet) -> None:
    fleet.set_faults(SLOW, {"kind": "error", "device": 1, "after": 10})
    result = fleet.run(prompts(150), fleet.places())
    failed = {worker.name: worker.error for worker in result.workers if worker.error}
    assert set(failed) == {"card 1"}, failed
    assert result.broken_off is None


def test_a_card_that_hangs_is_replaced(fleet: Fleet) -> None:
    fleet.set_faults({"kind": "hang", "device": 2, "at": 40})
    result = fleet.run(prompts(30), fleet.places(devices=[2]), policy=OF_SILENCE)
    assert "made no step for" in (result.workers[0].error or "")
    assert len({info.pid for info in fleet.infos}) == 2


def test_a_node_that_is_killed_takes_only_its_cards_along(fleet: Fleet) -> None:
    victim = fleet.nodes.worker_nodes.copy().pop()
    gone: list[object] = []

    def on_progress(progress: Any) -> None:
        if progress.rows_done >= 20 and not gone:
            gone.append(victim)
            fleet.nodes.remove_node(victim, allow_graceful=False)

    fleet.set_faults(SLOW)
    places = fleet.places()
    result = fleet.run(prompts(200), places, on_progress=on_progress)
    lost = {worker.name: worker.error or "" for worker in result.workers if worker.error}
    assert result.broken_off is None
    there = {where.name for where in places if where.node_id == victim.node_id}
    assert set(lost) == there, lost
    assert len(lost) == 2
    # What Ray knows when it first reports the loss depends on which of its connections broke.
    known = ("its node is gone", "its process died", "its process cannot be reached")
    assert all(any(why in error for why in known) for error in lost.values())
