"""Every rule that artifacts are held to: how bad it is to break it, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping

from qaic_ray.check.facts import ArtifactFinding, Grade, Rule

_QEFF = "https://github.com/quic/efficient-transformers"
_SDK = "https://github.com/quic/cloud-ai-sdk"
_PAGES = "quic/cloud-ai-sdk-pages"
_QDOC = "https://docs.qualcomm.com/doc/80-99100-3/topic"
_RT = "https://github.com/quic/software-kit-for-qualcomm-cloud-ai-100"

_EXAMPLE = "values are strings in every public specializations.json"
_RECIPE = f"{_SDK}, LlamaForCausalLM: README and specializations.json"
_CCL = f"{_QEFF}: QEfficient/utils/check_ccl_specializations.py"
_MDP = f"{_PAGES}: Features/model_sharding.md"
_RETAINED = f"{_PAGES}: Large-Language-Models (retained state), and {_SDK}, runModel.py"
_IO_LIST = f"{_QEFF}: custom_io.yaml as its compile() writes it"
_MXFP6 = f"{_QDOC}/index_Operator-and-Datatype-support.html; {_PAGES}: blogs/Microscaling"
_CARDS = f"{_PAGES}: Getting-Started/Architecture/index.md"
_SEEN = "seen in public logs of the vendor's compiler"
_EXTDATA = f"{_QEFF}/pull/1248: weights of a checkpoint as graph inputs"
_OPEN = f"{_RT}: the loader's own checks"


def _refused(source: str) -> Rule:
    return Rule(Grade.REFUSED, source)


def _remark(source: str) -> Rule:
    return Rule(Grade.REMARK, source)


RULES: Mapping[str, Rule] = {
    # specializations.json
    "specializations-unreadable": _refused(_RECIPE),
    "specializations-named": _refused(f"{_QEFF}/issues/1129"),
    "specializations-numbers": _refused(f"{_QEFF}/issues/1129; {_EXAMPLE}"),
    "specializations-size": _refused(_RECIPE),
    "specializations-keys": _refused(_RECIPE),
    "specializations-differ": _refused(_RECIPE),
    "specializations-equal": _remark(f"{_QEFF}: compile() leaves equal ones out"),
    "specializations-context": _refused(_RETAINED),
    "prompt-length": _refused(f"{_RECIPE}; {_QEFF}/pull/49"),
    "prompt-length-odd": _remark(_RECIPE),
    "slots": _refused(f"{_QEFF}: continuous batching, full_batch_size"),
    "slots-unlike": _remark(f"{_QEFF}: generate() with another kv_cache_batch_size"),
    "compute-context": _refused(_CCL),
    "compute-context-short": _remark(_CCL),
    "context-beyond-model": _refused("the model's own config: max_position_embeddings"),
    "symbols": _refused(f"{_PAGES}: -onnx-define-symbol, -network-specialization-config"),
    "cache-fixed": _refused(_RETAINED),
    # custom IO
    "custom-io-unreadable": _refused(_IO_LIST),
    "custom-io-precision": _refused(_IO_LIST),
    "custom-io-name": _remark(_IO_LIST),
    "custom-io-half": _refused(f"{_IO_LIST}: a state's input and output together"),
    "custom-io-integer": _remark(_IO_LIST),
    "custom-io-wide": _remark(f"{_IO_LIST}: the cache as float16 or mxint8"),
    "mxint8-width": _refused("community reports of the compiler: mxint8 in blocks of 32"),
    # MDP
    "mdp-unreadable": _refused(_MDP),
    "mdp-ids": _refused(f"{_MDP}; {_QEFF}: logical ids from 0"),
    "mdp-cores": _refused(_CARDS),
    "mdp-uneven": _remark(_MDP),
    "mdp-connection": _refused(_MDP),
    "mdp-through-host": _remark(f"{_MDP}: without connections, traffic goes through the host"),
    "mdp-heads": _remark(f"{_QEFF}/pull/328; replicate_kv_heads"),
    # the graph
    "onnx-unreadable": _refused("the compiler's reader: onnx.ModelProto"),
    "onnx-too-large": _refused(f"{_QEFF}/pull/950"),
    "weights-missing": _refused("ONNX: external data"),
    "weights-short": _refused("ONNX: external data"),
    "extdata": _refused(_EXTDATA),
    "extdata-sdk": _remark(f"{_EXTDATA}; the version is inferred"),
    "operator": _refused(f"{_QDOC}/index_Operator-and-Datatype-support.html"),
    "einsum": _remark(f"{_QDOC}/index_Operator-and-Datatype-support.html: einsum"),
    "io-names": _refused("QAicApi and qaicrt: a buffer is called by its name"),
    "io-type": _refused(f"{_PAGES}: types of buffers, QAicApi"),
    "range": _refused(f"{_SEEN}: Range: Non-constant start tensor not supported"),
    "shape-at-run-time": _refused(f"{_QEFF}: customop/ctx_scatter_gather_cb.py, of repeats"),
    "scatter": _refused(f"{_SDK}/issues/2"),
    "broadcast": _refused(f"{_SEEN}: Cannot broadcast"),
    "reshape": _refused(f"{_SEEN}: Reshape: different number of elements"),
    "fp16-range": _remark(f"{_QEFF}: FP16ClipTransform; fp16 ends at 65504"),
    "contract": _refused(f"{_QEFF}: releases up to v1.15 export cache_index for these SDKs"),
    "retained-state": _refused(f"{_SDK}/issues/2: Invalid option -retained-state"),
    "state-alone": _remark(_RETAINED),
    "state-unlike": _refused(_RETAINED),
    "state-renamed": _remark(f"{_QEFF}: subfunction exports, _InternalRetainedState"),
    # weights and memory
    "mxfp6-not-constant": _remark(f"{_MXFP6}: constant weights of MatMul"),
    "mxfp6-hidden": _remark(f"{_MXFP6}: constant weights of MatMul"),
    "mxfp6-gathered": _remark(f"{_MXFP6}: constant weights of MatMul"),
    "mxfp6-gemm": _remark(f"{_MXFP6}: it speaks of MatMul alone"),
    "mxfp6-missing": _remark(f"{_QEFF}/issues/78; {_PAGES}: blogs/Microscaling"),
    "dram": _refused(f"{_CARDS}; {_RT}: NNC -4, Memory resource exhausted"),
    "dram-tight": _remark(f"{_CARDS}; public logs: activation takes 32 to 192 MiB more"),
    # how it is compiled
    "command-unreadable": _refused(f"{_QEFF}/pull/1271: qaic-compile.sh"),
    "cores": _refused(_CARDS),
    "hw-version": _refused(f"{_QEFF}: -aic-hw-version by release"),
    "no-fp16": _remark(f"{_PAGES}: -convert-to-fp16"),
    "no-retained-state": _remark(_RETAINED),
    "no-compile-only": _remark(f"{_PAGES}: -compile-only"),
    "partitions-together": _refused("community reports: no SDP with depth-first or with MDP"),
    "model-moved": _remark(f"{_QEFF}: absolute paths in hashed_compile_params.json"),
    # programs and folders
    "program-unreadable": _refused(_OPEN),
    "program-parts": _refused(f"{_OPEN}: network.elf, networkdesc.bin, constantsdesc.bin"),
    "program-missing": _refused(f"{_QEFF}: compile() takes such a folder for a failed compile"),
    "program-changed": _refused("the record that was written with it"),
    "export-changed": _refused("the manifest that was written with it"),
    "specializations-missing": _remark(f"{_QEFF}: cloud.execute reads them above the QPC"),
}


MAX_CHARS = 600


def found(rule: str, place: str, says: str, remedy: str) -> ArtifactFinding:
    """A finding of a rule; names of a file that are no names of a sane length are cut."""
    known = RULES[rule]
    return ArtifactFinding(rule, known.grade, place, _line(says), _line(remedy), known.source)


def _line(text: str) -> str:
    whole = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return whole if len(whole) <= MAX_CHARS else f"{whole[:MAX_CHARS]}..."
