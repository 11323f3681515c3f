"""Finding SDK folders, and reading what their device tool prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from qaic_ray.errors import DeviceError, SdkNotFound, UsageError
from qaic_ray.options import EmulatorOptions
from qaic_ray.sdk import (
    Sdk,
    find_sdk,
    name_for_others,
    open_sdk,
    parse_devices,
    parse_lines,
)

CARDS = EmulatorOptions(cards=4, sku="standard", apps_version="1.20")

# The open tool's text (MB) for one card, and the 1.21 tool's (KB) for another that is not ready.
QAIC_UTIL = """\
QID 0
\tStatus:Ready
\tPCI Address:0000:36:00.0
\tDram Total:16308 MB
\tDram Free:16000 MB
\tDram Fragmentation:0.00%
\tNsp Total:14
\tNsp Free:7
\tNSP Frequency(Mhz):595.20
\tSku Type:PCIe
QID 3
\tStatus:Error
\tPCI Address:0000:37:00.0
QID 4
\tStatus:Ready
\tDram Total:31391744 KB
\tDram Free:31391744 KB
\tNsp Total:16
\tNsp Free:16
\tSku Type:PCIe Ultra
"""


def make(root: Path, *, apps: str = "1.20", util: str = "exit 0", emulated: bool = False) -> Path:
    for folder in ("exec", "tools", "versions"):
        (root / folder).mkdir(parents=True)
    (root / "exec" / "qaic-exec").touch()
    (root / "versions" / "apps.xml").write_text(
        f"<versions><ci_build><base_version>{apps}</base_version></ci_build></versions>"
    )
    tool = root / "tools" / "qaic-util"
    tool.write_text("#!/bin/sh\n" + util)
    tool.chmod(0o755)
    if emulated:
        (root / "emulated-sdk.json").write_text("{}")
    return root


def test_devices_of_both_tools_are_read() -> None:
    first, second, third = parse_devices(QAIC_UTIL)
    assert (first.qid, first.ready, first.sku) == (0, True, "PCIe")
    assert (first.nsp_total, first.nsp_free) == (14, 7)
    assert first.dram_total_bytes == 16308 * 2**20
    assert (second.qid, second.ready, second.nsp_total) == (3, False, 0)
    assert third.dram_total_bytes == 31391744 * 2**10


def test_a_line_with_nothing_behind_its_colon_swallows_no_other() -> None:
    lines = parse_lines("QID 0\n\tStatus:Ready\n\tBoard serial:\n\tPCI Address:0000:36:00.0\r\n")
    expected = {"Status": "Ready", "Board serial": "", "PCI Address": "0000:36:00.0"}
    assert lines == {"0": expected}


def test_no_device_is_an_empty_list() -> None:
    assert parse_devices("") == []


def test_folder_tells_kind_and_version(tmp_path: Path) -> None:
    real = open_sdk(make(tmp_path / "real", apps="1.14.2.0A"))
    assert (real.kind, real.version) == ("real", (1, 14, 2, 0))
    assert open_sdk(make(tmp_path / "other", emulated=True)).kind == "emulated"


@pytest.mark.parametrize(
    ("apps", "named", "hw_version"),
    [("1.14.2.0A", False, "2.0"), ("1.20", False, "2.0"), ("1.21.6", False, "ai100"),
     ("1.22.0.119", True, "ai100")],
)  # fmt: skip
def test_generation_decides_the_compiler_s_words(apps: str, named: bool, hw_version: str) -> None:
    sdk = Sdk(Path("/opt/qti-aic"), "real", apps)
    assert (sdk.named_specializations, sdk.hw_version) == (named, hw_version)


def test_folder_that_is_no_sdk_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(SdkNotFound, match="exec/qaic-exec"):
        open_sdk(tmp_path)
    with pytest.raises(SdkNotFound, match="no Cloud AI SDK folder"):
        open_sdk(tmp_path / "gone")


def test_broken_version_file_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "sdk")
    (root / "versions" / "apps.xml").write_text("<versions>")
    with pytest.raises(SdkNotFound, match=r"apps\.xml is not XML"):
        open_sdk(root)
    (root / "versions" / "apps.xml").write_text("<versions/>")
    with pytest.raises(SdkNotFound, match="no base_version"):
        open_sdk(root)


def test_choice_goes_name_then_variable_then_vendor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, variable, vendor = (make(tmp_path / name) for name in ("named", "variable", "vendor"))
    monkeypatch.setenv("QAIC_RAY_SDK", str(variable))
    assert find_sdk(str(named), CARDS, vendor_root=vendor).root == named
    assert find_sdk(None, CARDS, vendor_root=vendor).root == variable
    monkeypatch.delenv("QAIC_RAY_SDK")
    assert find_sdk("auto", CARDS, vendor_root=vendor).root == vendor
    assert find_sdk("real", CARDS, vendor_root=vendor).root == vendor


def test_real_is_never_answered_by_the_emulated_one(tmp_path: Path) -> None:
    with pytest.raises(SdkNotFound, match="for `emulated`, in place of `real`"):
        find_sdk("real", CARDS, vendor_root=tmp_path / "none")
    fake = make(tmp_path / "fake", emulated=True)
    with pytest.raises(SdkNotFound, match="is the emulated one"):
        find_sdk("real", CARDS, vendor_root=fake)


def test_cards_without_an_sdk_are_not_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QAIC_RAY_SDK", raising=False)
    with pytest.raises(SdkNotFound, match="has Cloud AI 100 cards but no SDK"):
        find_sdk(None, CARDS, vendor_root=tmp_path / "none", has_cards=lambda: True)


def test_failing_device_tool_says_why(tmp_path: Path) -> None:
    sdk = open_sdk(make(tmp_path / "sdk", util="echo 'no driver' >&2; exit 1"))
    with pytest.raises(DeviceError, match="no driver"):
        sdk.devices()
    (sdk.root / "tools" / "qaic-util").unlink()
    with pytest.raises(DeviceError, match="Cannot run"):
        sdk.devices()


def test_a_folder_s_name_means_the_driver_s_on_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [name_for_others(word) for word in ("auto", "real", "emulated")] == [
        "auto", "real", "emulated"
    ]  # fmt: skip
    assert name_for_others("./sdk") == str(tmp_path / "sdk")


@pytest.mark.parametrize("text", ["QID x\n", f"QID {'9' * 5000}\n", "QID 0\n\tNsp Total:many\n"])
def test_a_number_of_the_tool_that_is_none_is_a_device_error(text: str) -> None:
    with pytest.raises(DeviceError, match="which is no number"):
        parse_devices(text)


def test_numerics_are_the_variable_s_or_the_folder_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QAIC_EMULATOR_NUMERICS", raising=False)
    (tmp_path / "emulated-sdk.json").write_text('{"numerics": "fast"}')
    sdk = Sdk(tmp_path, "emulated", "1.20")
    assert (sdk.numerics, sdk.description) == ("fast", "emulated SDK 1.20, fast numerics")
    assert Sdk(tmp_path, "real", "1.20").numerics is None
    monkeypatch.setenv("QAIC_EMULATOR_NUMERICS", "exact")
    assert (sdk.numerics, sdk.description) == ("exact", "emulated SDK 1.20")
    monkeypatch.setenv("QAIC_EMULATOR_NUMERICS", "slow")
    with pytest.raises(UsageError, match="QAIC_EMULATOR_NUMERICS is 'slow': give exact or fast"):
        _ = sdk.numerics
