"""The environment variables that are read, for help pages and the reference: ours and others'."""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """What people read of a variable; `default` is what holds where it is not set."""

    name: str
    meaning: str
    default: str
    example: str


OURS = (
    Variable(
        "QAIC_RAY_SDK",
        "The SDK where --sdk, or a job's sdk, is auto: a name or a folder.",
        "/opt/qti-aic, else the emulated SDK where there is no card",
        "emulated",
    ),
    Variable(
        "QAIC_RAY_CACHE",
        "Folder of what is kept between commands.",
        "~/.cache/qaic-ray",
        "/scratch/me/qaic-ray",
    ),
    Variable(
        "QAIC_RAY_LOCKS",
        "Folder of the locks by which processes of a machine share its cards.",
        "/tmp/qaic-ray-locks; where QAIC_RAY_CACHE is set, cards in it",
        "/run/lock/qaic-ray",
    ),
)
EMULATED = (
    Variable(
        "QAIC_EMULATOR_STATE",
        "Folder in which the processes of a machine share the state of emulated cards. Processes "
        "with different folders see different cards.",
        "one in the system's temporary folder, by user and SDK folder",
        "/tmp/my-cards",
    ),
    Variable(
        "QAIC_EMULATOR_CACHE",
        "Folder of the machine code that emulated cards run.",
        "QAIC_RAY_CACHE, else ~/.cache/qaic-ray",
        "/scratch/me/emulator",
    ),
    Variable(
        "QAIC_EMULATOR_FAULTS",
        "A YAML or JSON file of faults that the emulated cards have on demand.",
        "no faults",
        "faults.yaml",
    ),
    Variable(
        "QAIC_EMULATOR_TIMING",
        "A YAML or JSON file of a time model for the emulated cards. Reports say when it is on.",
        "no time model",
        "timing.yaml",
    ),
    Variable(
        "QAIC_EMULATOR_RECORD",
        "Dump the first executions of each activation of any program, as aic_batch_io.json: how "
        "many, and into which folder.",
        "nothing is dumped",
        "100:/tmp/bundles",
    ),
    Variable(
        "AIC_EXTERNAL_DATA_ROOT",
        "Folder in which compilers look first for the files of a model whose weights lie in a "
        "checkpoint.",
        "the model's folder, and that of the checkpoint",
        "/data/checkpoints",
    ),
    Variable(
        "QAIC_EMULATOR_NUMERICS",
        "How emulated cards compute: exact or fast.",
        "what the SDK was laid down with",
        "fast",
    ),
    Variable(
        "QAIC_EMULATOR_THREADS",
        "Most threads that one emulated card computes with.",
        "all cores, shared by the cards that work",
        "2",
    ),
    Variable(
        "QAIC_EMULATOR_KERNELS",
        "onnxruntime has onnxruntime run the lowered graph in place of the compiled step.",
        "the compiled step, where the processor has one",
        "onnxruntime",
    ),
    Variable(
        "QAIC_EMULATOR_CPU",
        "The processor that the compiled step is made for: its name in LLVM, and features.",
        "this machine's",
        "haswell,+avx2,+fma,+f16c",
    ),
    Variable(
        "QAIC_EMULATOR_APPS_VERSION",
        "The version of the Apps SDK that the emulated compiler behaves like.",
        "what the SDK was laid down with",
        "1.22",
    ),
    Variable(
        "QAIC_EMULATOR_PYTHON",
        "The Python that the commands of the emulated SDK run with.",
        "the one that laid the SDK down",
        "/usr/bin/python3.8",
    ),
    Variable(
        "QAIC_EMULATED_SDK_ROOT",
        "The emulated SDK that the modules qaicrt and qaic use where they cannot tell by their "
        "own place.",
        "the SDK that they came with, else /opt/qti-aic",
        "/tmp/qti-aic",
    ),
    Variable(
        "QAIC_SERIALIZE_DEVICE",
        "1 lets programs lock a device (the vendor's variable).",
        "lockDevice is not supported",
        "1",
    ),
    Variable(
        "AIC_EXTERNAL_DATA_ROOT",
        "Folder in which a compiler looks first for the weight files that a graph names (the "
        "vendor's variable).",
        "the folders that the graph names, and its own",
        "/models/llama",
    ),
    Variable(
        "QAIC_COMPILER_OPTS_UNSUPPORTED",
        "More options for the emulated compiler, which lists them as without effect (the vendor's "
        "variable).",
        "none",
        "-allocator-dealloc-delay=2",
    ),
)
RAYS = (
    Variable(
        "RAY_ADDRESS",
        "The cluster that status, logs and stop ask, after RAY_API_SERVER_ADDRESS.",
        "this machine's cluster",
        "10.0.0.1:6379",
    ),
    Variable(
        "RAY_API_SERVER_ADDRESS",
        "The dashboard of the cluster that status, logs and stop ask.",
        "RAY_ADDRESS",
        "http://10.0.0.1:8265",
    ),
    Variable(
        "RAY_AUTH_MODE",
        "Whether a Ray wants a token: token or disabled. A Ray that is started here obeys it.",
        "token, for a Ray that is started here",
        "token",
    ),
    Variable(
        "RAY_AUTH_TOKEN", "The token of a cluster.", "the file of RAY_AUTH_TOKEN_PATH", "6f1c..."
    ),
    Variable(
        "RAY_AUTH_TOKEN_PATH", "The file of the token.", "~/.ray/auth_token", "/run/secrets/ray"
    ),
    Variable("RAY_TMPDIR", "Folder in which Ray notes its cluster.", "/tmp", "/scratch/ray"),
    Variable(
        "RAY_USE_TLS",
        "Set where a cluster wants TLS: its head is then not tried out first.",
        "not set",
        "1",
    ),
    Variable(
        "RAY_custom_unit_instance_resources",
        "Holds qaic on a cluster whose Ray hands out single cards.",
        "the cluster's own setting",
        "qaic",
    ),
    Variable(
        "RAY_SERVE_ENABLE_HA_PROXY",
        "1 on each node of a cluster for `serve --haproxy`. On one machine it is set for you.",
        "Ray Serve's own proxy",
        "1",
    ),
    Variable(
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
        "Seconds that a replica behind HAProxy goes on listening after its end.",
        "2",
        "30",
    ),
    Variable(
        "RAY_DEDUP_LOGS_SKIP_REGEX",
        "Which lines of logs Ray does not merge. We have it merge none.",
        ".",
        "ERROR",
    ),
    Variable("RAY_USAGE_STATS_ENABLED", "1 lets Ray report its usage to its makers.", "0", "1"),
)
OTHERS = (
    Variable(
        "HF_HOME", "Folder of the Hugging Face hub's files.", "~/.cache/huggingface", "/data/hf"
    ),
    Variable(
        "HF_HUB_CACHE", "Folder of models that were fetched.", "hub in HF_HOME", "/data/hf/hub"
    ),
    Variable(
        "HF_TOKEN",
        "The token for models that the hub gives to known accounts only.",
        "what `hf auth login` left",
        "hf_...",
    ),
    Variable(
        "HF_HUB_OFFLINE", "1 keeps the hub's client from the network.", "the network is used", "1"
    ),
    Variable("XDG_CACHE_HOME", "Folder of the user's caches.", "~/.cache", "/scratch/me/cache"),
    Variable("COLUMNS", "Width of tables and help pages.", "the terminal's, else 80", "120"),
    Variable(
        "TERM", "dumb or unknown: no colours and no live line.", "the terminal's", "xterm-256color"
    ),
    Variable("NO_COLOR", "Any value: no colours.", "not set", "1"),
    Variable(
        "SSH_CONNECTION",
        "Set by ssh: where a dashboard was opened, the command for a tunnel is shown too.",
        "not set",
        "203.0.113.5 50022 198.51.100.7 22",
    ),
)
REMOTE = (
    Variable(
        "AWS_ACCESS_KEY_ID",
        "Who asks for s3:// files, with AWS_SECRET_ACCESS_KEY.",
        "the role of the machine",
        "AKIA...",
    ),
    Variable("AWS_SECRET_ACCESS_KEY", "The secret of that key.", "the role of the machine", "..."),
    Variable("AWS_REGION", "The region of s3:// files.", "the bucket's own", "eu-central-1"),
    Variable(
        "AWS_ENDPOINT_URL",
        "Another server of S3; `?endpoint_override=` of a URI says it for that URI.",
        "Amazon's",
        "http://127.0.0.1:9000",
    ),
    Variable(
        "GOOGLE_APPLICATION_CREDENTIALS",
        "The file of the key for gs:// files.",
        "the machine's own account",
        "key.json",
    ),
)
"""Read by pyarrow's filesystems."""
GROUPS = {
    "Ours": OURS,
    "The emulated SDK": EMULATED,
    "Ray": RAYS,
    "Remote files": REMOTE,
    "The hub, the terminal and the machine": OTHERS,
}
"""All that are read, and what they are of."""

ENVIRONMENT = {variable.name: variable.meaning for variable in OURS}
"""The variables that change what is done, for help pages."""
