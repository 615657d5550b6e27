"""Engines without a model: the KV-checksum runner behind the real cache, batch builder, executor, loop and API."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.program.cuda_library import CudaLibrary

VOCAB = 211

# Where `loaded` puts the checksum model: None is the native executor, else device "cuda" as cuda.open_device gives it.
# conftest.py sets it for the test that runs.
ON_CUDA: tuple[CudaLibrary, str] | None = None


@dataclasses.dataclass(frozen=True)
class Device:
    """What a test runs on. emulated: the kernels run on the CPU, a thousand times slower: ask for little."""

    name: str
    emulated: bool = False


def run(main: Coroutine[Any, Any, Any], runner: Callable[[Any], Any] = asyncio.run) -> Any:
    """asyncio.run, but a request that never ends fails its test instead of hanging it."""

    async def limited() -> Any:
        async with asyncio.timeout(120):
            return await main

    return runner(limited())


def settings(**changes: Any) -> EngineConfig:
    return EngineConfig.from_kwargs(
        "checksum",
        **({"skip_tokenizer_init": True, "page_size": 16, "max_running_requests": 16, "random_seed": 1} | changes),
    )


def loaded(
    config: EngineConfig,
    *,
    num_pages: int = 512,
    kind: str = "full",
    window: int = 0,
    runner: _core.Runner | None = None,
    vocab_size: int = VOCAB,
    context_len: int = 4096,
    eos: tuple[int, ...] = (),
    max_step_tokens: int | None = None,
    two_groups: bool = False,
    first_failure: str = "unsent",
    **checksum: Any,
) -> SimpleNamespace:
    """What models/loader.py would hand over. eos: ids that end a request. runner: a native one, whatever the device.
    first_failure, checksum: checksum_on_cuda.ChecksumModel's, and _core.checksum_runner's but for the former.
    """
    groups = [_core.KvGroup(kind, window=window, page_size=config.page_size)]
    if two_groups:
        groups.append(_core.KvGroup("window", window=24, page_size=config.page_size))
    pages = [num_pages] * len(groups)
    max_step_tokens = max_step_tokens or config.chunked_prefill_size + config.max_running_requests
    executor: Any
    if runner is None and ON_CUDA is not None:
        import checksum_on_cuda

        executor = checksum_on_cuda.start(
            ON_CUDA, groups, pages, config, vocab_size=vocab_size, context_len=context_len,
            max_step_tokens=max_step_tokens, first_failure=first_failure, **checksum,
        )  # fmt: skip
    else:
        executor = _core.Executor(
            runner or _core.checksum_runner(groups, pages, vocab_size, **checksum),
            groups,
            config.max_running_requests,
            trace_capacity=config.trace_capacity,
        )
    return SimpleNamespace(
        executor=executor,
        groups=groups,
        num_pages=pages,
        vocab_size=vocab_size,
        eos_token_ids=list(eos),
        context_len=context_len,
        max_step_tokens=max_step_tokens,
        cache_salt=7,
        name="checksum",
        runner=None,
        model_dir=None,
        generation_defaults={},
        rope_mode=lambda total_len: 0,
    )


def expected(model: SimpleNamespace, prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens the checksum model generates after prompt, by the tokens alone; cut behind the first EOS."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(_core.checksum_next_token(model.groups, model.vocab_size, np.array(tokens, np.int32)))
        if tokens[-1] in model.eos_token_ids:
            break
    return tokens[len(prompt) :]
