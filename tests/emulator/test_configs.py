"""The compiler's command line and config files by themselves: what is read, what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from compiled import FUZZ_EXAMPLES
from hypothesis import given, settings

from qaic_ray.emulator.compiler import argv, configs
from qaic_ray.emulator.compiler.argv import ArgvError
from qaic_ray.emulator.compiler.configs import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "json.exception.parse_error.101"),
        ("[]", "'specializations' must be a list"),
        ('{"specializations": []}', "'specializations' must be a list"),
        ('{"specializations": [{"batch_size": 1}]}', "type must be string, but is number"),
        ('{"specializations": [{"batch_size": null}]}', "type must be string, but is null"),
        ('{"specializations": [3]}', "type must be object, but is number"),
        ('{"specializations": [{"batch_size": "-1"}]}', "Invalid value '-1'"),
        ('{"specializations": [{"batch_size": "0"}]}', "Invalid value '0'"),
        ('{"specializations": [{"batch_size": "eight"}]}', "Invalid value 'eight'"),
    ],
)
def test_a_bad_specialization_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configs.read_specializations(str(path), named=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"partitions": [{}]}',
        '{"partitions": [{"devices": [{"deviceId": 1, "numCores": 2}]}]}',
        '{"partitions": [{"devices": [{"deviceId": 0, "numCores": 0}]}]}',
        '{"partitions": [{"devices": [{"deviceId": true, "numCores": 1}]}]}',
    ],
)
def test_a_bad_partition_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mdp.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        configs.read_partition(str(path))


def test_custom_io_is_read_as_the_exporters_write_it(tmp_path: Path) -> None:
    path = tmp_path / "io.yaml"
    path.write_text(
        " - IOName: past_key.0\n   Precision: float16\n\n"
        "# values\n - IOName: 'past_value.0'\n   Precision: mxint8 # KV\n"
    )
    assert configs.read_custom_io(str(path)) == {"past_key.0": "float16", "past_value.0": "mxint8"}
    path.write_text(" - IOName: past_key.0\n   Precision: float8\n")
    with pytest.raises(ConfigError, match="float8"):
        configs.read_custom_io(str(path))
    path.write_text("past_key.0: float16\n")
    with pytest.raises(ConfigError, match="line 1"):
        configs.read_custom_io(str(path))


flags = st.sampled_from([*argv.FLAGS, "-x", "--m", "", "-"])
values = st.one_of(
    st.none(), st.sampled_from(["1", "true", "2.0", "a,1", "Int8", "", "=", "0"]), st.text()
)


@settings(max_examples=FUZZ_EXAMPLES)
@given(st.lists(st.tuples(flags, values), max_size=6))
def test_fuzzed_command_lines_are_parsed_or_refused(pairs: list[tuple[str, str | None]]) -> None:
    arguments = [flag if value is None else f"{flag}={value}" for flag, value in pairs]
    with contextlib.suppress(ArgvError):
        options = argv.parse(arguments)
        assert set(options.values) <= set(argv.FLAGS)


KEYS = st.sampled_from(
    ["specializations", "symbols", "name", "partitions", "devices", "deviceId", "numCores"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS | st.text(), x, max_size=3),
    max_leaves=8,
)
TEXTS = st.one_of(
    JSON.map(json.dumps),
    JSON.map(lambda x: json.dumps({"specializations": x, "partitions": x})),
    JSON.map(lambda x: json.dumps({"specializations": [x], "partitions": [x]})),
    st.text(),
    st.lists(st.sampled_from([" - IOName: a", "   Precision: float16", "  - x", "\t", "Layout:"]))
    .map("\n".join),
)  # fmt: skip


@settings(max_examples=FUZZ_EXAMPLES)
@given(data=TEXTS.map(str.encode) | st.binary())
def test_fuzzed_config_files_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for read in (
        configs.read_partition,
        configs.read_custom_io,
        lambda p: configs.read_specializations(p, named=True),
        lambda p: configs.read_specializations(p, named=False),
    ):
        with contextlib.suppress(ConfigError):
            read(str(path))
