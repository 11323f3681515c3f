"""configs/cluster/dl2q.yaml against the schema of Ray's own launcher, and what we rely on in it."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qaic_ray import __version__
from qaic_ray.cards.inventory import CARD_RESOURCE

CONFIG = Path(__file__).parents[2] / "configs" / "cluster" / "dl2q.yaml"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return document


def test_the_launcher_takes_it(config: dict[str, Any]) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"worker_nodes": {}}, schema)


def test_a_dl2q_offers_its_eight_cards_and_the_head_none(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    workers = {name for name in types if name != config["head_node_type"]}
    for name in workers:
        assert types[name]["node_config"]["InstanceType"] == "dl2q.24xlarge"
        assert types[name]["resources"] == {CARD_RESOURCE: 8}
    assert CARD_RESOURCE not in types[config["head_node_type"]]["resources"]
    assert sum(types[name]["max_workers"] for name in workers) <= config["max_workers"]


def test_ray_chooses_cards_and_the_dashboard_is_the_heads_alone(config: dict[str, Any]) -> None:
    words = shlex.split(config["head_start_ray_commands"][-1])
    given = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    setting = json.loads(given["--system-config"])["custom_unit_instance_resources"]
    assert setting.split(",")[-1] == CARD_RESOURCE
    assert given["--dashboard-host"] == "127.0.0.1"


def test_every_node_installs_the_wheel_that_the_launcher_carries_to_it(
    config: dict[str, Any],
) -> None:
    home = f"/home/{config['auth']['ssh_user']}"
    ((there, here),) = [
        mount for mount in config["file_mounts"].items() if mount[1].endswith(".whl")
    ]
    wheel = f"qaic_ray-{__version__}-py3-none-any.whl"
    assert here == f"dist/{wheel}"  # where `make wheel` writes it
    assert there == f"{home}/wheels/{wheel}"  # pip takes a wheel under its own name only

    def installs(commands: list[str]) -> list[set[str]]:
        """The words of each pip install, as the node's shell makes them of its command."""
        words = [shlex.split(command.replace("$HOME", home)) for command in commands]
        found = [line for line in words if line[1:2] == ["install"]]
        return [{word.replace("~/", f"{home}/") for word in line} for line in found]

    each, again = installs(config["setup_commands"])
    assert {there, f"ray[default]=={pinned('ray')}"} <= each
    assert {there, "--force-reinstall", "--no-deps"} <= again
    (head,) = installs(config["head_setup_commands"])
    assert f"{there}[export]" in head
    assert not any(
        "qaic-ray" in line.replace("~/qaic-ray/", "") for line in commands_of_pip(config)
    )


def pinned(name: str) -> str:
    lines = (CONFIG.parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(version for line in lines for n, _, version in [line.partition("==")] if n == name)


def commands_of_pip(config: dict[str, Any]) -> list[str]:
    both = [*config["setup_commands"], *config["head_setup_commands"]]
    return [command for command in both if "pip install" in command]


def test_every_node_gets_the_token_and_nothing_of_a_user_is_in_the_file(
    config: dict[str, Any],
) -> None:
    home = f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"][f"{home}/.ray/auth_token"] == "~/.ray/auth_token"
    assert len(config["file_mounts"]) == 2
    assert any("RAY_AUTH_MODE=token" in line for line in config["initialization_commands"])
    images = {kind["node_config"]["ImageId"] for kind in config["available_node_types"].values()}
    assert all(image.startswith("<") and image.endswith(">") for image in images)
