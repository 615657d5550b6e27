"""Which file serves which architecture. Adding a model is one file with a `MODEL` and one line here.

From outside the package the line is an entry point of the group "sapwood.models" whose name is the architecture:

    [project.entry-points."sapwood.models"]
    MyModelForCausalLM = "my_package.my_model:MODEL"

models/loader.py asks with the name config.json gives.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.models.config import HfConfig
from sapwood.program.ir import ActDType, Program

ENTRY_POINT_GROUP = "sapwood.models"


class ModelConfig(Protocol):
    """What the loader needs of any model's configuration. DecoderConfig is one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_len(self) -> int: ...
    def rope_mode(self, total_len: int) -> int: ...


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """A family of checkpoints.

    configure   config.json to the family's configuration; raises InvalidRequest or UnsupportedModel naming the field
    record      (configuration, compute dtype, longest request in tokens) to a Program
    """

    configure: Callable[[HfConfig], Any]
    record: Callable[[Any, ActDType, int], Program]


ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "sapwood.models.llama:MODEL",
        "MistralForCausalLM": "sapwood.models.mistral:MODEL",
        "Qwen2ForCausalLM": "sapwood.models.qwen2:MODEL",
        "Qwen3ForCausalLM": "sapwood.models.qwen3:MODEL",
        "Phi3ForCausalLM": "sapwood.models.phi3:MODEL",
    }
)


def supported() -> list[str]:
    """Every architecture that `resolve` knows, installed packages' included, sorted."""
    return sorted({*ARCHITECTURES, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))})


def resolve(architecture: str) -> ModelFamily:
    """The family of an architecture. Imports its file only. UnsupportedModel names what is supported.

    An installed entry point comes before the built-in table, so that a package can replace a model.
    """
    points = [p for p in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if p.name == architecture]
    if len(points) > 1:
        raise InvalidRequest(
            f"{architecture} is claimed by {len(points)} installed packages: {[p.value for p in points]}", "model"
        )
    if points:
        family, where = points[0].load(), points[0].value
    elif architecture in ARCHITECTURES:
        where = ARCHITECTURES[architecture]
        module, _, attribute = where.partition(":")
        family = getattr(importlib.import_module(module), attribute)
    else:
        raise UnsupportedModel(
            f"architecture {architecture!r} is not supported; supported: {', '.join(supported())}. "
            f"Others can be added through the entry point group {ENTRY_POINT_GROUP!r}",
            "model",
        )
    if not isinstance(family, ModelFamily):
        raise InvalidRequest(
            f"{where} must be a sapwood.models.registry.ModelFamily, got {type(family).__name__}", "model"
        )
    return family
