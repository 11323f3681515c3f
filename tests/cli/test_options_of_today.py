"""Every option of every command, every key of a job, every environment variable: none gets lost.

The lists are written by hand. Who adds an option adds its line; who takes a line away breaks
somebody's script.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from qaic_ray.cli.commands import app
from qaic_ray.pipeline.job import dump_job, load_job

FLAG = True

# Spellings, and a word that is taken; FLAG where none follows. `/` parts a flag from its opposite.
COMMANDS: dict[str, dict[str, Any]] = {
    "": {
        "--debug": FLAG,
        "--version -V": FLAG,
        "--install-completion": FLAG,
        "--show-completion": FLAG,
    },
    "launch": {
        "JOB": "job.yaml",
        "--set": "run.generation_len=64",
        "--model -m --model-name": "smollm2-135m",
        "--prompt": "a|b",
        "--input -i --prompts-file": "p.txt",
        "--shard": "3/64",
        "--max-tokens --generation-len": "64",
        "--device-id --devices": "0,3",
        "--sdk": "emulated",
        "--output -o": "elsewhere",
        "--address": "auto",
        "--dashboard / --no-dashboard": FLAG,
        "--keep-ray --keep_ray": FLAG,
        "--detach": FLAG,
        "--folder": "there",
        "--python": "/usr/bin/python3",
        "--send-prompts / --no-send-prompts": FLAG,
        "--resume": "runs/a",
        "--retry-errors --retry_errors": FLAG,
        "--stream": "rows",
        "--no-stream --no_stream": FLAG,
        "--stop-if-errors --stop_if_errors": "20%",
        "--verbose -v": FLAG,
        "--log-format --log_format": "json",
        "--json": FLAG,
    },
    "demo": {
        "--folder": "there",
        "--device-id --device_id --devices": "0,1",
        "--address": "auto",
        "--dashboard / --no-dashboard": FLAG,
        "--keep-ray --keep_ray": FLAG,
        "--sdk": "emulated",
        "--stream": "rows",
        "--no-stream --no_stream": FLAG,
        "--stop-if-errors --stop_if_errors": "20%",
        "--verbose -v": FLAG,
        "--log-format --log_format": "json",
        "--json": FLAG,
    },
    "schema": {"[JOB]": "job.yaml", "--json": FLAG},
    "init": {"NAME": "mine", "--from": "chat", "--model -m": "org/x", "--json": FLAG},
    "plan": {
        "JOB": "job.yaml",
        "--set": "run.generation_len=64",
        "--model -m --model-name": "smollm2-135m",
        "--prompt": "a|b",
        "--input -i --prompts-file": "p.txt",
        "--shard": "3/64",
        "--max-tokens --generation-len": "64",
        "--device-id --devices": "0,3",
        "--sdk": "emulated",
        "--output -o": "elsewhere",
        "--json": FLAG,
    },
    "export": {
        "[MODEL]": "smollm2-135m",
        "--model -m --model-name --model_name": "smollm2-135m",
        "--model-class --model_class": "LlamaForCausalLM",
        "--output -o": "m-kv",
        "--io": "cache-index",
        "--continuous-batching": FLAG,
        "--opset": "13",
        "--dtype": "float16",
        "--weights": "reference",
        "--kv-dtype": "mxint8",
        "--logits": "all",
        "--next-tokens": FLAG,
        "--replicate-kv-heads": "2",
        "--comp-ctx-lengths": FLAG,
        "--verify": "quick",
        "--verbose -v": FLAG,
        "--log-format": "json",
        "--json": FLAG,
    },
    "compile": {
        "MODEL_DIR": "m-kv",
        "[mx6|fp16|fp32]": "fp16",
        "[NSP]": "7",
        "--specializations": "s.json",
        "--batch-size --batch_size": "1,8",
        "--prompt-len --prompt_len": "32,64+256",
        "--ctx-len --ctx_len": "512,2048",
        "--prefill-rows": "4",
        "--num-speculative-tokens": "3",
        "--comp-ctx-lengths": "512,1024",
        "--num-cores --num_cores": "7,14",
        "--precision": "mx6,fp16",
        "--output -o": "qpcs",
        "--jobs": "2",
        "--layout": "qefficient",
        "--dashboard": FLAG,
        "--keep-ray --keep_ray": FLAG,
        "--sdk": "emulated",
        "--verbose -v": FLAG,
        "--log-format": "json",
        "--json": FLAG,
    },
    "run": {
        "[MODEL]": "smollm2-135m",
        "[PROMPT]": "a|b",
        "--text": "a|b",
        "--precision": "fp16",
        "--num-cores --num_cores": "7",
        "--batch-size --batch_size": "4",
        "--model -m --model-name --model_name": "smollm2-135m",
        "--qpc": "qpc/a",
        "--prompt": "a|b",
        "--input -i --prompts-file --prompts_file": "-",
        "--prompts-format --prompts_format": "openai",
        "--limit --max-prompts --max_prompts": "100",
        "--shard": "3/64",
        "--sample": "5%",
        "--sample-seed --sample_seed": "7",
        "--chat": FLAG,
        "--system": "Be brief.",
        "--chat-template --chat_template": "t.jinja",
        "--chat-template-kwargs --chat_template_kwargs": '{"enable_thinking": false}',
        "--continue-final-message --continue_final_message": FLAG,
        "--no-add-generation-prompt --no_add_generation_prompt": FLAG,
        "--temperature": "0.7",
        "--top-k --top_k": "40",
        "--top-p --top_p": "0.9",
        "--min-p --min_p": "0.1",
        "--repetition-penalty --repetition_penalty": "1.1",
        "--presence-penalty --presence_penalty": "0.5",
        "--frequency-penalty --frequency_penalty": "-0.5",
        "--seed": "7",
        "--run-seed --run_seed": "8",
        "--n": "2",
        "--logprobs": "5",
        "--max-tokens --max_tokens --generation-len --generation_len": "64",
        "--min-tokens --min_tokens": "4",
        "--stop": "END",
        "--stop-token-ids --stop_token_ids": "13,198",
        "--ignore-eos --ignore_eos": FLAG,
        "--speculate": "none",
        "--draft-qpc --draft_qpc": "qpc/d",
        "--device-id --device_id --devices": "0,3",
        "--partitions": "2",
        "--group-size --group_size": "4",
        "--input-len --input_len": "32",
        "--ctx-len --ctx_len": "128",
        "--output -o": "elsewhere",
        "--output-format --output_format": "parquet",
        "--output-parts --output_parts": "s3://bucket/parts",
        "--part-rows --part_rows": "5000",
        "--record": "100",
        "--metrics / --no-metrics": FLAG,
        "--resume": "runs/a",
        "--retry-errors --retry_errors": FLAG,
        "--stream": "rows",
        "--no-stream --no_stream": FLAG,
        "--stop-if-errors --stop_if_errors": "20%",
        "--verbose -v": FLAG,
        "--log-format --log_format": "json",
        "--address": "auto",
        "--dashboard": FLAG,
        "--keep-ray --keep_ray": FLAG,
        "--sdk": "real",
        "--json": FLAG,
    },
    "serve": {
        "[TARGET]": "smollm2-135m",
        "--target": "smollm2-135m",
        "--set": "serve.port=9000",
        "--model -m --model-name --model_name": "org/x",
        "--system": "Be brief.",
        "--chat-template --chat_template": "t.jinja",
        "--chat-template-kwargs --chat_template_kwargs": '{"enable_thinking": false}',
        "--speculate": "none",
        "--draft-qpc --draft_qpc": "qpc/d",
        "--device-id --device_id --devices": "0,3",
        "--partitions": "2",
        "--group-size --group_size": "4",
        "--input-len --input_len": "32",
        "--ctx-len --ctx_len": "128",
        "--precision": "fp16",
        "--num-cores --num_cores": "7",
        "--batch-size --batch_size": "4",
        "--host": "0.0.0.0",
        "--port": "9000",
        "--served-model-name --served_model_name": "mine",
        "--folder": "there",
        "--api-keys --api_keys": "keys.txt",
        "--no-auth --no_auth": FLAG,
        "--tool-form --tool_form": "hermes",
        "--allow-unknown-fields --allow_unknown_fields": FLAG,
        "--log-prompts --log_prompts": FLAG,
        "--drain-s --drain_s": "30.0",
        "--max-waiting --max_waiting": "64",
        "--max-per-key --max_per_key": "8",
        "--max-body-mib --max_body_mib": "4",
        "--request-timeout-s --request_timeout_s": "60.0",
        "--client-stall-s --client_stall_s": "10.0",
        "--kept-slots --kept_slots": "2",
        "--ray-serve --ray_serve": FLAG,
        "--min-replicas --min_replicas": "2",
        "--max-replicas --max_replicas": "4",
        "--cards-per-replica --cards_per_replica": "2",
        "--interface-replicas --interface_replicas": "2",
        "--haproxy": FLAG,
        "--address": "auto",
        "--dashboard": FLAG,
        "--keep-ray --keep_ray": FLAG,
        "--sdk": "real",
        "--verbose -v": FLAG,
        "--log-format --log_format": "json",
        "--json": FLAG,
    },
    "status": {
        "[WHAT]": "a-1",
        "--watch -w": FLAG,
        "--output -o": "elsewhere",
        "--address": "http://head:8265",
        "--json": FLAG,
    },
    "logs": {
        "WHAT": "a-1",
        "--output -o": "elsewhere",
        "--address": "http://head:8265",
        "--follow -f": FLAG,
    },
    "stop": {
        "WHAT": "a-1",
        "--output -o": "elsewhere",
        "--address": "http://head:8265",
        "--json": FLAG,
    },
    "runs": {"[FOLDER]": "runs", "--output -o": "elsewhere", "--json": FLAG},
    "show": {"RUN": "runs/a", "ROW": "3", "--output -o": "elsewhere", "--json": FLAG},
    "check": {
        "PATH": "m-kv",
        "--sdk-version --sdk_version": "1.20",
        "--sku": "standard",
        "--convert": "converted",
        "--sdk": "real",
        "--json": FLAG,
    },
    "doctor": {"--address": "auto", "--sdk": "real", "--try-cards": FLAG, "--json": FLAG},
    "devices": {"--address": "auto", "--sdk": "real", "--json": FLAG},
    "report": {"RUN...": "runs/a", "--output -o --html": "page.html", "--json": FLAG},
    "merge": {
        "RUN...": "runs/a",
        "--output -o": "merged",
        "--output-parts --output_parts": "s3://bucket/parts",
        "--part-rows --part_rows": "5000",
        "--json": FLAG,
    },
    "compare": {"A": "a", "B": "b", "--tolerance": "0.1", "--json": FLAG},
    "monitoring": {"FOLDER": "m", "--json": FLAG},
    "key": {"NAME": "alice", "--json": FLAG},
    "emulator install": {
        "PREFIX": "sdk",
        "--apps-version": "1.22",
        "--cards": "8",
        "--numerics": "fast",
        "--sku": "ultra",
        "--json": FLAG,
    },
    "emulator run": {"COMMAND": "python", "--sdk": "emulated"},
    "ray show": {"--json": FLAG},
    "ray env": {"--json": FLAG},
    "ray stop": {"--force": FLAG, "--json": FLAG},
}
NEEDED = {
    "launch": ["JOB"],
    "init": ["NAME"],
    "plan": ["JOB"],
    "compile": ["MODEL_DIR"],
    "check": ["PATH"],
    "report": ["RUN..."],
    "merge": ["RUN..."],
    "compare": ["A", "B"],
    "monitoring": ["FOLDER"],
    "key": ["NAME"],
    "serve": ["[TARGET]"],
    "logs": ["WHAT"],
    "stop": ["WHAT"],
    "show": ["RUN", "ROW"],
    "emulator install": ["PREFIX"],
    "emulator run": ["COMMAND"],
}

JOB = """
name: every-key
model: {name: smollm2-135m, model_class: LlamaForCausalLM, trust_remote_code: true}
export:
  output: /m-kv
  io: position-ids
  continuous_batching: true
  opset: 17
  dtype: float16
  weights: copy
  kv_dtype: mxint8
  logits: num_logits_to_keep
  next_tokens: true
  replicate_kv_heads: 2
  comp_ctx_lengths: true
  verify: quick
compile:
  precision: [fp16, mx6]
  num_cores: [7]
  batch_size: [1, 4]
  prompt_len: [32, 64+128]
  ctx_len: [512]
  prefill_rows: 1
  num_speculative_tokens: 3
  comp_ctx_lengths: [256]
  output: /qpcs
  parallel: 2
  layout: qefficient
run:
  variant: {precision: fp16, num_cores: 7, batch_size: 4, prompt_len: 64+128, ctx_len: 512}
  devices: [0, 3]
  prompts: /p.jsonl
  prompts_format: jsonl
  prompt: null
  shard: 3/64
  sample: 5%
  sample_seed: 7
  max_prompts: 100
  generation_len: 64
  sampling:
    n: 2
    min_tokens: 4
    temperature: 0.7
    top_k: 40
    top_p: 0.9
    min_p: 0.1
    repetition_penalty: 1.1
    presence_penalty: 0.5
    frequency_penalty: -0.5
    seed: 7
    stop: [END]
    stop_token_ids: [13, 198]
    include_stop_str_in_output: true
    ignore_eos: true
    logprobs: 5
    prompt_logprobs: 2
    structured_outputs: {choice: ["yes", "no"]}
    logit_bias: {"198": -100.0, "13": 2.5}
    allowed_token_ids: [13, 198]
    bad_words: [never]
    skip_special_tokens: false
  seed: 8
  chat: true
  system: Be brief.
  add_generation_prompt: false
  continue_final_message: true
  chat_template_kwargs: {enable_thinking: false}
  chat_template: /t.jinja
  date: '2031-02-03T04:05:06'
  max_stall_s: 0.5
  input_len: 128
  ctx_len: 512
  prefix_reuse: false
  drafts: none
  draft_qpc: /d
  partitions: 2
  group_size: 4
  metrics: false
  output: /elsewhere
  output_formats: [openai, parquet]
  output_parts: s3://bucket/parts
  part_rows: 5000
  record: 100
serve:
  host: 0.0.0.0
  port: 9000
  served_model_name: [mine, mine-too]
  folder: /serving
  api_keys: /keys.txt
  no_auth: true
  tool_form: hermes
  allow_unknown_fields: true
  log_prompts: true
  drain_s: 30.0
  max_waiting: 64
  max_per_key: 8
  max_body_mib: 4
  request_timeout_s: 60.0
  client_stall_s: 10.0
  kept_slots: 2
  ray_serve: true
  min_replicas: 2
  max_replicas: 4
  cards_per_replica: 2
  interface_replicas: 2
  haproxy: true
sdk: emulated
emulator: {cards: 8, sku: ultra, apps_version: '1.22', numerics: fast}
ray: {dashboard: false, keep_ray: true, address: auto}
"""

ENVIRONMENT = (
    "QAIC_RAY_CACHE",
    "QAIC_RAY_LOCKS",
    "QAIC_RAY_SDK",
    "QAIC_RAY_SESSION",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_USE_TLS",
    "QAIC_EMULATED_SDK_ROOT",
    "QAIC_EMULATOR_APPS_VERSION",
    "QAIC_EMULATOR_PYTHON",
    "QAIC_EMULATOR_STATE",
    "QAIC_EMULATOR_TIMING_ACTIVE",
)


@cache
def of_name(name: str) -> Any:
    command = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    return command


def parameters(command: Any) -> list[Any]:
    context = command.context_class(command, info_name="qaic-ray")
    return [p for p in command.get_params(context) if "--help" not in p.opts]


def parameter_of(command: Any, spellings: str) -> Any:
    """The parameter that has all the spellings; more than one is one too many."""
    words = set(map(with_dashes, spellings.replace(" / ", " ").split()))
    (found,) = [p for p in parameters(command) if words <= spelled(p)]
    return found


def spelled(parameter: Any) -> set[str]:
    if parameter.param_type_name == "argument":
        return {with_dashes(parameter.metavar or parameter.name.upper())}
    return {*parameter.opts, *parameter.secondary_opts}


def with_dashes(word: str) -> str:
    """Words of a flag are registered with dashes alone; those with underscores are the same."""
    return word.replace("_", "-")


def ways() -> list[tuple[str, str, str]]:
    return [
        (name, spellings, spelling)
        for name, options in COMMANDS.items()
        for spellings in options
        for spelling in spellings.replace(" / ", " ").split()
        if name and spelling.startswith("-")
    ]


def plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_that_it_had(name: str) -> None:
    """None is gone; a new one has its line."""
    command = of_name(name)
    known = [parameter_of(command, spellings) for spellings in COMMANDS[name]]
    assert {p.name for p in parameters(command)} == {p.name for p in known}
    assert len(known) == len(parameters(command))


def test_there_is_no_other_command() -> None:
    root = of_name("")
    groups = {name: group.commands for name, group in root.commands.items() if is_group(group)}
    found = {f"{name} {inner}" for name, commands in groups.items() for inner in commands}
    assert found | set(root.commands) - set(groups) == set(COMMANDS) - {""}


def is_group(command: Any) -> bool:
    return hasattr(command, "commands")


@pytest.mark.parametrize(("name", "spellings", "spelling"), ways())
def test_an_option_is_parsed_by_each_of_its_spellings(
    name: str, spellings: str, spelling: str
) -> None:
    command, sample = of_name(name), COMMANDS[name][spellings]
    given = [spelling] if sample is FLAG else [spelling, sample]
    for needed in NEEDED.get(name, ()):
        if needed != spellings:
            option = needed.split()[0]
            words = [option] if option.startswith("-") else []
            given = [*words, COMMANDS[name][needed], *given]
    if name == "emulator run":  # all that follows the command is the command's
        given = given[1:] + given[:1]
    context = command.make_context(name, given)
    parameter = parameter_of(command, spellings)
    source = context.get_parameter_source(parameter.name)
    assert source is not None
    assert source.name == "COMMANDLINE"
    value = plain(context.params[parameter.name])
    if sample is FLAG:
        assert value is (with_dashes(spelling) not in parameter.secondary_opts)
    elif isinstance(value, list):
        assert value == [sample]
    else:
        assert type(value)(sample) == value


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("", "emulator run")])
def test_arguments_are_parsed(name: str) -> None:
    words = {key: word for key, word in COMMANDS[name].items() if not key.startswith("--")}
    needed = [n.split()[0] for n in NEEDED.get(name, ()) if n.startswith("--")]
    extra = [word for option in needed for word in (option, "x")]
    command = of_name(name)
    context = command.make_context(name, [*words.values(), *extra])
    values = [
        plain(context.params[p.name])
        for p in parameters(command)
        if p.param_type_name == "argument"
    ]
    values = [value[0] if isinstance(value, list) else value for value in values]  # of several
    assert values == list(words.values())


def test_a_job_may_have_every_key_and_is_written_with_each(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    document = yaml.safe_load(JOB)
    written_out = yaml.safe_load(dump_job(load_job(path)))
    assert {key: written_out[key] for key in document} == document
    assert set(written_out) == set(document)
    for part in ("model", "export", "compile", "serve", "emulator", "ray"):
        assert set(written_out[part]) == set(document[part])


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_environment_variables_have_their_names(variable: str) -> None:
    package = Path(__file__).parents[2] / "qaic_ray"
    assert any(f'"{variable}"' in p.read_text() for p in package.rglob("*.py")), variable
