"""Rows that begin as copies of others, which no request asks for yet: builder and executor, driven step by step."""

from __future__ import annotations

import numpy as np
from fakes import expected, loaded, settings

from sapwood import _core


def test_a_fork_goes_on_from_copied_pages() -> None:
    """Three rows share a prompt that ends within a page; each writes on into a page of its own."""
    config = settings(page_size=4, max_running_requests=4)
    model = loaded(config, num_pages=64, two_groups=True)
    cache = _core.CacheManager(model.groups, model.num_pages)
    builder = _core.BatchBuilder(cache, config.max_running_requests)
    shared = list(range(3, 13))
    prompts = [shared, [*shared, 20], [*shared, 30, 31]]

    def admit(prompt: list[int], parent: int | None) -> int:
        tokens, lengths = np.asarray(prompt, np.int32), {"prompt_len": len(prompt), "max_len": len(prompt) + 8}
        if parent is None:
            row, _, cached = builder.admit(0, tokens, **lengths)
            assert cached == 0
        else:
            row, _, cached = builder.admit_fork(parent, len(shared), 0, tokens, **lengths)
            assert cached == len(shared)
        return row

    rows = [admit(prompts[0], None)]
    for step in range(10):
        builder.begin_step(step)
        builder.add_decodes()
        for row in rows:
            if builder.phase(row) == "extend":
                assert builder.add_extend(row, 100) > 0
        plan = builder.end_step().plan
        if plan is None:
            break
        model.executor.submit(plan)
        model.executor.wait_idle()
        result = model.executor.drain()[-1][2]
        assert result is not None and not result.error
        builder.commit(result)
        builder.check_invariants()
        if step == 0:
            rows += [admit(prompt, rows[0]) for prompt in prompts[1:]]
    for row, prompt in zip(rows, prompts, strict=True):
        assert builder.tokens(row).tolist() == prompt + expected(model, prompt, 8)
    model.executor.shutdown()
