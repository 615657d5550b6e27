"""What settings are called elsewhere: names of SGLang, vLLM and llama.cpp that mean a setting of ours, that ask for
what Sapwood always does, or that ask for what it does not have (floor 0).

settings.py looks names up here, whether they come from a command line, a file or the environment. Written with "_", as
fields are; SGLang's own names that config.py has already are not repeated.
"""

from __future__ import annotations

import fnmatch
from types import MappingProxyType
from typing import Final, NamedTuple


class Alias(NamedTuple):
    """Another name of `field`; inverted: switching this one on switches the field off."""

    field: str
    inverted: bool = False


# The same meaning only: a name that means nearly the same is in NOT_HERE, so that nobody is surprised.
ALIASES: Final = MappingProxyType(
    {
        # SGLang
        "model_path": Alias("model"),
        "tokenizer_path": Alias("tokenizer"),
        # vLLM
        "max_model_len": Alias("context_length"),
        "max_num_seqs": Alias("max_running_requests"),
        "max_num_batched_tokens": Alias("chunked_prefill_size"),
        "block_size": Alias("page_size"),
        "seed": Alias("random_seed"),
        "scheduling_policy": Alias("schedule_policy"),
        "enforce_eager": Alias("disable_cuda_graph"),
        "enable_prefix_caching": Alias("disable_radix_cache", inverted=True),
        "async_scheduling": Alias("disable_overlap_schedule", inverted=True),
        "enable_log_requests": Alias("log_requests"),
        "disable_log_requests": Alias("log_requests", inverted=True),
        "shutdown_timeout": Alias("drain_timeout_s"),
        # llama.cpp
        "threads": Alias("num_threads"),
        "parallel": Alias("max_running_requests"),
        "alias": Alias("served_model_name"),
    }
)

# Switches for what is always so: accepted, with the reason as a note.
NOT_NEEDED: Final = MappingProxyType(
    {
        "enable_metrics": "/metrics is always there",
        "metrics": "/metrics is always there",
        "enable_cache_report": "usage always reports cached tokens",
        "enable_prompt_tokens_details": "usage always reports cached tokens",
        "enable_mixed_chunk": "prefill and decode always share a step",
        "enable_chunked_prefill": "prefill is always chunked, by --chunked-prefill-size",
        "cont_batching": "batching is always continuous",
        "jinja": "chat templates are always Jinja",
        "trust_remote_code": "code in a checkpoint is never run",
        "disable_frontend_multiprocessing": "the server is one process",
    }
)

# What to do instead of asking for what is not there, and the names that ask for it (patterns). The first match counts.
NOT_HERE: Final = (
    (
        "one server uses one device; on CPUs see --num-threads, for more run several servers behind a proxy",
        "tp tp_size tensor_parallel_size tensor_split ts split_mode sm main_gpu mg pp pp_size pipeline_parallel_size "
        "dp dp_size data_parallel_* ep ep_size enable_expert_parallel nnodes node_rank dist_init_addr "
        "distributed_executor_backend enable_dp_attention",
    ),
    ("--device says where the whole model runs", "ngl n_gpu_layers gpu_layers num_gpus"),
    (
        "weights have --dtype (float32 or bfloat16) or --quantization (int8 or int4)",
        "q quantization_param_path torchao_config",
    ),
    ("--kv-cache-dtype int8 halves the KV cache; K and V have one precision", "cache_type_? ctk ctv"),
    (
        "the KV pool is --max-total-tokens, or --mem-fraction-static of the memory that is free beside the weights",
        "gpu_memory_utilization kv_cache_memory* num_gpu_blocks_override",
    ),
    ("weights and KV pool stay on the device", "swap_space cpu_offload_gb no_kv_offload nkvo"),
    ("--context-length is the longest request, --max-total-tokens the whole KV pool", "ctx_size c"),
    (
        "--chunked-prefill-size is the most prompt tokens one step computes",
        "max_prefill_tokens batch_size b ubatch_size ub long_prefill_token_threshold max_num_partial_prefills "
        "max_long_partial_prefills",
    ),
    ("--num-threads sets the compute threads", "t tb threads_batch"),
    ("one event loop serves HTTP", "threads_http tokenizer_worker_num detokenizer_worker_num api_server_count"),
    ("--max-running-requests is how many requests compute at once", "np"),
    ("--served-model-name is the model's name in the API", "a"),
    (
        "name the model as the argument: a directory in Hugging Face format or a hub id; GGUF is not read",
        "m hf hf_repo hfr hff hf_file mu model_url",
    ),
    ("set the environment variable HF_TOKEN", "hft hf_token"),
    ("set the environment variable HF_HUB_CACHE", "download_dir"),
    ("set the environment variable HF_HUB_OFFLINE=1", "offline"),
    (
        "the model's files decide; --tokenizer names another directory",
        "tokenizer_mode tokenizer_backend tokenizer_revision code_revision",
    ),
    ("edit the checkpoint's config.json", "json_model_override_args hf_overrides hf_config_path override_kv"),
    ("the checkpoint's config.json decides", "rope_* yarn_*"),
    (
        "tool calls and reasoning are not parsed out of the text yet",
        "tool_call_parser enable_auto_tool_choice reasoning_parser reasoning_format reasoning_budget",
    ),
    (
        "structured output is not there yet",
        "grammar_backend guided_decoding_backend structured_outputs_config constrained_json_* grammar grammar_file",
    ),
    ("adapters are not there yet; merge the adapter into the checkpoint", "enable_lora lora lora_* max_lora*"),
    ("speculative decoding is not there yet", "speculative_* spec_* model_draft md draft draft_max"),
    ("models read text alone", "mmproj mmproj_* limit_mm_per_prompt mm_* enable_multimodal"),
    (
        "the server generates text and has no embeddings, scores or classes yet",
        "is_embedding embedding embeddings reranking task runner convert pooler_config",
    ),
    (
        "--attention-backend chooses attention on --device cuda, --cpu-isa the CPU's instruction set; all else has one "
        "implementation",
        "*_attention_backend sampling_backend flash_attn fa enable_torch_compile torch_compile_* compilation_config "
        "moe_*",
    ),
    (
        "see --cuda-graph-max-bs and --disable-cuda-graph; the sizes of graphs are ours",
        "cuda_graph_bs cuda_graph_sizes cudagraph_* *_piecewise_cuda_graph piecewise_cuda_graph_*",
    ),
    (
        "the prefix cache lives in the KV pool alone",
        "enable_hierarchical_cache hicache_* kv_transfer_config slot_save_path",
    ),
    ("the least recently used pages leave the prefix cache first", "radix_eviction_policy"),
    ("prefill and decode run in one server", "disaggregation_*"),
    ("a full pool retracts requests and recomputes them", "schedule_conservativeness retraction_policy"),
    ("--schedule-policy priority does it", "enable_priority_scheduling"),
    ("--max-step-ms bounds what prefills cost those who decode", "prefill_decode_interval prefill_max_requests"),
    ("every token is an event of its own", "stream_interval"),
    ("a prompt that is too long is refused, with the numbers", "allow_auto_truncate"),
    ("put a reverse proxy in front", "ssl_* root_path fastapi_root_path path_prefix api_prefix enable_http2"),
    ("SAPWOOD_API_KEY or a --config file keep the key off the command line", "api_key_file"),
    ("--allowed-origins is the one setting for browsers", "allow_credentials allowed_methods allowed_headers"),
    ("see --request-timeout-s, --body-timeout-s and --send-timeout-s", "timeout to timeout_keep_alive"),
    ("--chat-template takes a Jinja file", "completion_template chat_template_*"),
    (
        "see --log-level and --log-requests; prompts and answers are never logged",
        "v verbose uvicorn_log_level log_level_http log_requests_level max_log_len enable_log_outputs log_disable "
        "disable_log_stats disable_uvicorn_access_log",
    ),
    ("weights are read into memory of their own, once", "mlock no_mmap mmap numa"),
)
# The same for what belongs to each request.
IN_REQUESTS: Final = (
    ("a request says max_tokens (max_new_tokens in /generate)", "n_predict predict n max_tokens max_new_tokens"),
    (
        "a request says it; the model's generation_config.json has the defaults",
        "temp temperature top_k top_p min_p samplers repeat_penalty repetition_penalty stop generation_config "
        "override_generation_config sampling_defaults preferred_sampling_params",
    ),
)


def advice(name: str, *, in_requests: bool = True) -> str | None:
    """What to do instead of setting `name` ("tensor_parallel_size"), which is no setting; None where nothing is known.

    in_requests   False: not of sampling parameters, for a command that has them
    """
    for instead, patterns in (*NOT_HERE, *(IN_REQUESTS if in_requests else ())):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split()):
            return instead
    return None
