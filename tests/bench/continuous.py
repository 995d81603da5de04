"""What libraries offer beside plain `generate`: transformers' continuous batching at its settings, and vLLM."""

import functools
import importlib.util
import tempfile

# A small grid: what transformers chooses itself, and what its documentation names for speed.
GRID = {
    "cuda": [
        ("sdpa", {}),
        ("sdpa", {"use_cuda_graph": True}),
        ("sdpa", {"use_cuda_graph": True, "use_async_batching": True, "max_requests_per_batch": 512}),
        ("sdpa", {"use_cuda_graph": True, "max_batch_tokens": 4096}),
        ("sdpa", {"default_compile_level": 1}),
        ("eager", {}),
    ],
    "cpu": [
        ("sdpa", {"num_blocks": 64, "max_batch_tokens": 2048}),
        ("eager", {"num_blocks": 64, "max_batch_tokens": 2048}),
    ],
}
FLASH = [("flash_attention_2", {}), ("flash_attention_2", {"use_cuda_graph": True, "use_async_batching": True})]


def grid(device):
    """[(attention, settings of ContinuousBatchingConfig), ...] to try on a device."""
    return GRID[device] + (FLASH if device == "cuda" and importlib.util.find_spec("flash_attn") else [])


def has_vllm():
    return importlib.util.find_spec("vllm") is not None


def name_of(attention, settings):
    """A setting in words; attention is paged in all of them."""
    return ", ".join(["continuous batching", f"paged {attention}", *(f"{k}={v}" for k, v in settings.items())])


def generate_continuously(model, prompts, limits, *, attention, settings):
    """Yield (number of the prompt, new token ids) by transformers' continuous batching, greedy, as answers finish.

    The manager that `model.generate_batch` uses, called directly, because generate_batch knows one limit for all rows.
    RuntimeError: a request failed, or the manager's thread ended.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    from peftlib.models.chat_template import STOP_IDS

    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    hints = WorkloadHints(
        max_prompt_length=max(map(len, prompts)), max_generated_length=max(limits), num_requests=len(prompts)
    )
    stops = {"eos_token_id": list(STOP_IDS), "pad_token_id": 0}
    chosen = GenerationConfig(do_sample=False, max_new_tokens=max(limits), **stops)
    manager = model.continuous_batching_context_manager(
        generation_config=chosen,
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        timeout=5,
        workload_hints=hints,
    )
    left = set(range(len(prompts)))
    try:
        with manager as running:
            for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
                running.add_request(
                    list(prompt), request_id=str(number), max_new_tokens=limit, eos_token_id=list(STOP_IDS)
                )
            while left:
                result = running.get_result(timeout=1)
                if result is None:
                    if not running.is_running():
                        raise RuntimeError("the thread of continuous batching ended before all rows were answered")
                elif result.error:
                    raise RuntimeError(f"a request failed: {result.error}")
                elif result.is_finished():
                    left.remove(int(result.request_id))
                    yield int(result.request_id), list(result.generated_tokens)
    finally:
        model.set_attn_implementation(before)


@functools.cache
def vllm_of(model, longest):
    """A vLLM engine for the model as it is in memory, started once: its start is no part of what is measured."""
    from peftlib.evaluation.inference.engines import require_vllm

    with tempfile.TemporaryDirectory(prefix="peftlib-bench-") as folder:
        model.save_pretrained(folder)
        settings = {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.4, "dtype": str(model.dtype).split(".")[1]}
        return require_vllm().LLM(model=folder, max_model_len=longest, **settings)


def generate_with_vllm(model, prompts, limits, *, longest):
    """As generate_continuously, by vLLM; answers come together, at the end."""
    from vllm import SamplingParams

    from peftlib.models.chat_template import STOP_IDS

    settings = [
        SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=list(STOP_IDS), detokenize=False)
        for limit in limits
    ]
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    made = vllm_of(model, longest).generate(asked, settings, use_tqdm=False)
    for number, answer in enumerate(made):
        yield number, list(answer.outputs[0].token_ids)
