"""The card tools' text, against the documented lines and the public parsers of it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from awaited import said
from compiled import write_qpc

from qaic_ray.emulator.card import Demand, Machine
from qaic_ray.emulator.container import NETWORK_DESC, SEGMENTS, QpcError, netdesc
from qaic_ray.emulator.folder import Folder
from qaic_ray.emulator.tools import qaic_qpc, qaic_util

# The open tool's lines in its order, with what is documented of their values.
DOCUMENTED = [
    r"QID 1",
    r"\tStatus:Ready",
    r"\tMHI ID:1",
    r"\tPCI Address:[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]",
    r"\tPCI Info:\S+ .*Qualcomm.*",
    r"\tDev Link:/dev/accel/accel1 ",
    r"\tDevice Capabilities:.*HybridBoot\+.*MDP\+",
    r"\tHW Version:2\.0\.0\.0",
    r"\tHW Serial:0x[0-9a-f]+",
    r"\tFW Version:\d+\.\d+\.\d+",
    r"\tFW QC_IMAGE_VERSION:QSM\.AIC.*",
    r"\tFW OEM_IMAGE_VERSION:",
    r"\tFW IMAGE_VARIANT:AIC100\.REL",
    r"\tNSP Version:\d+\.\d+\.\d+",
    r"\tNSP QC_IMAGE_VERSION:.*",
    r"\tNSP OEM_IMAGE_VERSION:",
    r"\tNSP IMAGE_VARIANT:.*",
    r"\tDram Total:16308 MB",
    r"\tDram Free:16308 MB",
    r"\tDram Fragmentation:0\.00%",
    r"\tVc Total:16",
    r"\tVc Free:16",
    r"\tPc Total:\d+",
    r"\tPc Reserved:\d+",
    r"\tNsp Total:14",
    r"\tNsp Free:14",
    r"\tLast 100ms Average Dram Bw:0 KBps",
    r"\tMCID Total:3072",
    r"\tMCID Free:3072",
    r"\tSemaphore Total:32",
    r"\tSemaphore Free:32",
    r"\tConstants Loaded:0",
    r"\tConstants In-Use:0",
    r"\tNetworks Loaded:0",
    r"\tNetworks Active:0",
    r"\tNSP Frequency\(Mhz\):595\.20",
    r"\tDDR Frequency\(Mhz\):2133\.00",
    r"\tCOMPNOC Frequency\(Mhz\):1450\.00",
    r"\tMEMNOC Frequency\(Mhz\):1000\.00",
    r"\tSYSNOC Frequency\(Mhz\):667\.00",
    r"\tMetadata Version:0\.10",
    r"\tNNC Command Protocol Version:\d+\.\d+",
    r"\tSBL Image:.*",
    r"\tPVS Image Version:\d+",
    r"\tNSP Defective PG Mask: 0x[0-9A-F]+",
    r"\tSku Type:PCIe",
    r"\tBoard serial:\S+",
    r"\tSoC temperature\(degree C\):\d+\.\d\d",
    r"\tBoard power\(Watts\):\d+\.\d\d",
    r"\tTDP Cap\(Watts\):75\.00",
]


def query(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert qaic_util.main(argv) == 0
    return capsys.readouterr().out


def test_query_of_one_card_is_the_documented_text(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    head, text = query(capsys, "-q", "-d", "1").split("Number of devices: 1\n")
    assert re.fullmatch(r"LRT QC_IMAGE_VERSION:\S+\nLRT IMAGE_VARIANT:LRT\.AIC\.REL\n", head)
    found = text.removesuffix("\n").split("\n")
    assert len(found) == len(DOCUMENTED)
    for line, pattern in zip(found, DOCUMENTED, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_the_parsers_in_the_wild_read_it(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = machine.claim({2: Demand(5, 1 << 30, 1)})
    text = query(capsys, "-q")
    claim.release()
    blocks = re.split(r"(?m)^QID ", text)[1:]
    assert [int(block.split()[0]) for block in blocks] == [0, 1, 2, 3]
    assert int(blocks[2].split("Nsp Free:")[1].split()[0]) == 9
    assert int(blocks[2].split("Nsp Total:")[1].split()[0]) == 14
    assert blocks[2].split("Status:")[1].split()[0] == "Ready"
    assert "AIC200" not in text
    assert text.count("Nsp Free:14") == 3
    assert "Networks Active:1" in blocks[2]
    assert "NSP Frequency(Mhz):1450.00" in blocks[2]


def test_from_1_21_on_dram_is_told_in_kilobytes_and_an_socs_power_beside_the_boards(
    tmp_path: Path, machine: Machine
) -> None:
    newer = Machine(Folder(tmp_path, "1.21.6", num_cards=1, sku="ultra"))
    lines = qaic_util.lines(newer, newer.card(0), 0.0)
    assert {"Dram Total:31391744 KB", "Nsp Total:16", "Pc Total:7"} <= set(lines)
    # The end of a card's block, as it is public of an Ultra.
    tail = [line.split(":")[0] for line in lines[-7:]]
    assert tail == [
        "Sku Type",
        "Board serial",
        "SoC temperature(degree C)",
        "Board power(Watts)",
        "Board TDP Cap(Watts)",
        "SOC power(Watts)",
        "SOC TDP Cap(Watts)",
    ]
    assert {"Sku Type:Pcie Ultra", "Board TDP Cap(Watts):150.00"} <= set(lines)
    assert lines[-1] == "SOC TDP Cap(Watts):31.00"


def test_the_socs_of_a_board_have_one_serial_and_one_power(tmp_path: Path) -> None:
    ultra = Machine(Folder(tmp_path, "1.22", num_cards=2, sku="ultra"))

    def told(qid: int) -> dict[str, str]:
        lines = qaic_util.lines(ultra, ultra.card(qid), 7.0)
        return dict(line.split(":", 1) for line in lines[1:])

    idle = told(1)
    claim = ultra.claim({1: Demand(16, 0, 1), 2: Demand(8, 0, 1)})
    cards = [told(qid) for qid in range(8)]
    claim.release()
    boards = [card["Board serial"] for card in cards]
    assert boards[:4] == [boards[0]] * 4
    assert boards[4:] == [boards[4]] * 4
    assert boards[0] != boards[4]
    power = [float(card["Board power(Watts)"]) for card in cards]
    assert power[:4] == [power[0]] * 4
    # 24 of the board's 64 NSPs are held: 0.42 of 150 W at all of them.
    gained = power[0] - float(idle["Board power(Watts)"])
    assert gained == pytest.approx(0.42 * 150 * 24 / 64, abs=0.011)
    soc = [float(card["SOC power(Watts)"]) for card in cards]
    assert soc[1] > soc[2] > soc[0]
    assert len({card["HW Serial"] for card in cards}) == 8


def test_an_unknown_device(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert qaic_util.main(["-q", "-d", "1", "-d", "9"]) == 255
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Device 9 invalid\n")


def test_a_card_in_error_shows_only_where_it_is(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.set_status(1, 2)
    text = query(capsys, "-q", "-d", "1")
    assert "\tStatus:Error\n" in text
    assert text.endswith("\tDev Link:/dev/accel/accel1 \n")
    assert query(capsys, "-s", "-p", "0000:37:00.0") == ""
    assert "\tStatus:Ready\n" in query(capsys, "-q", "-d", "1")


def test_filter_json_and_version(
    machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    serial = re.search(r"Board serial:(\S+)", query(capsys, "-q", "-d", "3"))
    assert serial is not None
    chosen = query(capsys, "-q", "-f", f"Board serial=={serial[1]}")
    assert re.findall(r"(?m)^QID (\d+)", chosen) == ["3"]
    path = tmp_path / "devices.json"
    assert query(capsys, "-q", "-j", str(path)) == ""
    devices = json.loads(path.read_text())["device_info"]
    assert [device["qid"] for device in devices] == [0, 1, 2, 3]
    assert devices[0]["dev_status"] == "Ready"
    assert devices[0]["sku_type"] == "PCIe"
    assert devices[0]["nsp_total"] == devices[0]["nsp_free"] == 14
    assert query(capsys, "-V").startswith("LRT QC_IMAGE_VERSION:")
    assert qaic_util.main(["-j", str(tmp_path / "no" / "file")]) == 255
    assert "Failed to open file" in capsys.readouterr().err
    assert query(capsys, "-a") == ""


@pytest.mark.parametrize("argv", [["-h"], ["--help"], ["-x"], ["--tables"]])
def test_usage(argv: list[str], machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert qaic_util.main(argv) == 255
    assert capsys.readouterr().out.startswith("Usage: qaic-util [options]\n")


def test_table_is_printed_once_where_nobody_watches(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = machine.claim({0: Demand(7, 1 << 30, 1)})
    machine.set_status(3, 2)
    text = query(capsys, "-t", "1")
    claim.release()
    machine.set_status(3, 1)
    assert "DeviceID-0 --- Status: Ready --- FW Version: 1.20.0" in text
    for cell in (
        r"NSP Used / Total: +7 / 14",
        r"NW Loaded / Active: +1 / 1",
        r"DRAM Used / Total: +1024 MB / 16308 MB",
        r"DRAM Bandwidth: +\d+\.\d\d KBps",
        r"NSP Frequency: +1450\.00 Mhz",
        r"DDR Frequency: +2133\.00 Mhz",
        r"Temperature: +\d+\.\d\d C",
        r"Power / TDP Cap: +\d+\.\d\d W / 75\.00 W",
    ):
        assert re.search(cell, text), cell
    assert "DeviceID-3 --- Status: Invalid --- FW Version: Invalid" in text


def test_table_on_a_terminal_goes_on_until_interrupted(sdk: Path, machine: Machine) -> None:
    ours, theirs = pty.openpty()
    # A shell's background job, as this test may be in, has its children ignore SIGINT.
    hears = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    hears += "os.execv(sys.argv[1], sys.argv[1:])"
    tool = [str(sdk / "tools" / "qaic-util"), "-t", "1"]
    process = subprocess.Popen([sys.executable, "-c", hears, *tool], stdout=theirs)
    os.close(theirs)
    seen = b""
    while seen.count(b"Date & time") < 2:
        seen += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 0
    os.close(ours)


def test_telemetry_drifts_and_is_the_same_for_the_same_second(machine: Machine) -> None:
    card = machine.card(0)
    first, again, later = (qaic_util.lines(machine, card, now) for now in (100.2, 100.9, 112.0))
    assert first == again
    assert first != later


def test_device_partition_holds_a_derived_device_while_it_runs(
    sdk: Path, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    sizes = {"ddrSize": 5000, "numNsp": 4, "numMcid": 10, "numSem": 20, "numVc": 1, "l2Region": 9}
    config.write_text(json.dumps(sizes))
    command = [str(sdk / "tools" / "qaic-device-partition"), "-p", str(config), "-d", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "Running... \n"
    text = query(capsys, "-q", "-d", "100")
    assert "\tNsp Total:4\n" in text
    assert "\tDram Total:5000 MB\n" in text
    assert "\tPCI Address:0000:00:00.0\n" in text
    assert machine.card(2).free.num_nsps == 10
    process.kill()
    said(process)
    assert machine.card(2).free.num_nsps == 14
    assert qaic_util.main(["-q", "-d", "100"]) == 255


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"numNsp": 1}', "ddrSize must be a number"),
        ('{"nsp": 1}', "Invalid config detected nsp"),
        (
            '{"ddrSize": 1, "numNsp": 15, "numMcid": 0, "numSem": 0, "numVc": 1, "l2Region": 0}',
            "Failed to create reservation 0, 15",
        ),
    ],
)
def test_device_partition_refuses(
    sdk: Path, machine: Machine, tmp_path: Path, text: str, message: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    command = [str(sdk / "tools" / "qaic-device-partition"), "-p", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "Failed to create partitions!\n")
    assert message in result.stderr


@pytest.fixture
def container(tmp_path: Path) -> Path:
    ios = (netdesc.Io("x", 0, (1, 4), False),), (netdesc.Io("y", 0, (1, 2), True),)
    network = netdesc.Network("net", *ios, 7, 1, ())
    path = tmp_path / "programqpc.bin"
    segments = {name: name.encode() for name in SEGMENTS}
    segments[NETWORK_DESC] = netdesc.serialize(network)
    write_qpc(str(path), segments)
    return path


def test_qpc_validate_tells_the_cores(container: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qaic_qpc.main(["validate", "-i", str(container)]) == 0
    assert "Number of NSP required: 7\n" in capsys.readouterr().out
    container.write_bytes(b"no container")
    assert qaic_qpc.main(["validate", "-i", str(container)]) == 1
    assert capsys.readouterr().err.startswith("Failed to open QPC: ")


def test_qpc_extract_writes_what_is_asked_for(container: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    arguments = ["extract", "--qpc", str(container), "--output-dir", str(target)]
    patterns = ["-s", "*networkdesc.bin_dir/networkdesc.json", "-s", "*StaticConstants*"]
    assert qaic_qpc.main(arguments + patterns) == 0
    files = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert files == ["StaticConstants.constants.bin", "networkdesc.bin_dir/networkdesc.json"]
    content = json.loads((target / files[1]).read_text())
    assert content["network_name"] == "net"
    assert content["inputs"] == [{"name": "x", "type": 0, "dims": [1, 4]}]


def test_a_query_is_quick(sdk: Path, machine: Machine) -> None:
    subprocess.run([str(sdk / "tools" / "qaic-util"), "-q"], check=True, capture_output=True)
    before = os.times()
    subprocess.run([str(sdk / "tools" / "qaic-util"), "-q"], check=True, capture_output=True)
    after = os.times()
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    assert cpu_s < 0.5


@pytest.mark.parametrize("kind", ["link", "linked folder", "dots", "absolute"])
def test_nothing_is_extracted_beyond_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target, mine = tmp_path / "out", tmp_path / "mine"
    target.mkdir()
    mine.mkdir()
    (mine / "networkdesc.json").write_text("precious")
    name = {"dots": "../mine/networkdesc.json", "absolute": str(mine / "networkdesc.json")}.get(
        kind, "networkdesc.bin_dir/networkdesc.json"
    )
    if kind == "link":
        (target / "networkdesc.bin_dir").mkdir()
        (target / name).symlink_to(mine / "networkdesc.json")
    elif kind == "linked folder":
        (target / "networkdesc.bin_dir").symlink_to(mine)
    with pytest.raises(QpcError):
        qaic_qpc._write(target, name, b"new")
    assert (mine / "networkdesc.json").read_text() == "precious"
    qaic_qpc._write(target, "beside", b"old")
    qaic_qpc._write(target, "beside", b"new")
    assert (target / "beside").read_bytes() == b"new"
