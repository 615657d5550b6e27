"""Sapwood: serving large language models on CPUs and NVIDIA GPUs, with prefix caching at its heart.

    from sapwood import Engine, SamplingParams

    with Engine("path/to/checkpoint") as engine:
        print(engine.generate("Once upon a time", SamplingParams(temperature=0)).text)

The names load when first used, so that `import sapwood` (and `sapwood --version`) costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ("AsyncEngine", "Engine", "RequestOutput", "SamplingParams", "__version__")

if TYPE_CHECKING:
    from sapwood.engine.async_engine import AsyncEngine as AsyncEngine
    from sapwood.engine.async_engine import Engine as Engine
    from sapwood.request import RequestOutput as RequestOutput
    from sapwood.request import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    if name in ("AsyncEngine", "Engine"):
        from sapwood.engine import async_engine

        return getattr(async_engine, name)
    if name in ("RequestOutput", "SamplingParams"):
        from sapwood import request

        return getattr(request, name)
    raise AttributeError(f"module 'sapwood' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
