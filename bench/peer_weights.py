"""A checkpoint's weights as int8 or int4 in the compressed-tensors format, which vLLM reads; for bench/peers.py.

    w8a8    int8, one scale for each output channel; activations are quantised while computing, each token by itself
    w4a16   int4, one scale for each 128 weights of an output channel, eight values in an int32, lowest bits first

Both are symmetric, rounded to nearest, no calibration: what speed depends on. All matrices of the layers are quantised;
embedding and LM head stay as they are, for vLLM has no kernels for them. Works tensor by tensor on numpy alone.
Format: the compressed-tensors package, formats "int-quantized" and "pack-quantized".
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

GROUP: Final = 128
FORMS: Final = ("w8a8", "w4a16")
# safetensors' names; BF16 has no type in numpy, its bits are carried as uint16.
DTYPES: Final[Mapping[str, type[np.generic]]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

Array = np.ndarray[Any, np.dtype[Any]]
# name -> (safetensors' dtype, values)
Tensors = dict[str, tuple[str, Array]]


# --- safetensors
def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Each tensor's dtype, shape and data_offsets, and the byte where the data begins. ValueError for another file."""
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= size <= path.stat().st_size - 8:
            raise ValueError(f"{path} is no safetensors file: its header's length is {size} bytes")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def read_tensors(path: Path) -> Iterator[tuple[str, str, Array]]:
    """(name, dtype, values) of each tensor, mapped from the file. ValueError for a dtype other than DTYPES."""
    header, begin = read_header(path)
    for name, entry in header.items():
        dtype = entry["dtype"]
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is {dtype}; weights to be quantised must be one of {', '.join(DTYPES)}")
        shape = tuple(entry["shape"])
        yield name, dtype, np.memmap(path, DTYPES[dtype], "r", begin + entry["data_offsets"][0], shape)


def write_tensors(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def as_float(values: Array, dtype: str) -> Array:
    """fp32 of a tensor as read_tensors gives it."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


# --- quantising
def int8_channels(weights: Array) -> tuple[Array, Array]:
    """int8 of weights (out, in) fp32, and their scales (out, 1) fp32."""
    scales = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(weights / scales).astype(np.int8), scales


def int4_groups(weights: Array) -> tuple[Array, Array]:
    """int4 of weights (out, in) fp32, biased by 8, packed (out, in / 8); and scales (out, in / GROUP) fp32."""
    num_out, num_in = weights.shape
    if num_in % GROUP:
        raise ValueError(f"int4 weights come in groups of {GROUP}, but a matrix has {num_in} inputs")
    groups = weights.reshape(num_out, num_in // GROUP, GROUP)
    scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(7.5)
    scales[scales == 0] = 1
    values = (np.clip(np.rint(groups / scales), -8, 7) + 8).astype(np.uint32).reshape(num_out, num_in // 8, 8)
    packed = np.bitwise_or.reduce(values << np.arange(0, 32, 4, dtype=np.uint32), axis=2)
    return packed.view(np.int32), scales[:, :, 0]


def quantize_tensor(name: str, dtype: str, values: Array, form: str) -> Tensors:
    """What takes the tensor's place: itself, where it is not a matrix of a layer."""
    if values.ndim != 2 or ".layers." not in name or not name.endswith("_proj.weight"):
        return {name: (dtype, values)}
    weights = as_float(values, dtype)
    stem = name.removesuffix("weight")
    if form == "w8a8":
        int8, scales = int8_channels(weights)
        return {name: ("I8", int8), f"{stem}weight_scale": ("F32", scales)}
    packed, scales = int4_groups(weights)
    return {
        f"{stem}weight_packed": ("I32", packed),
        f"{stem}weight_scale": ("F32", scales),
        f"{stem}weight_shape": ("I64", np.array(values.shape, np.int64)),
    }


def quantization_config(form: str) -> dict[str, Any]:
    """config.json's quantization_config."""
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
    activations: dict[str, Any] | None = None
    if form == "w8a8":
        weights |= {"num_bits": 8, "strategy": "channel", "group_size": None}
        activations = {"type": "int", "symmetric": True, "dynamic": True, "num_bits": 8, "strategy": "token"}
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if form == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def weight_files(checkpoint: Path) -> list[Path]:
    """FileNotFoundError where there is none."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{checkpoint} has no *.safetensors file; bench/make_model.py writes such a checkpoint")
    return files


def quantize_checkpoint(checkpoint: Path, directory: Path, form: str) -> None:
    """Write the checkpoint's weights in a form of FORMS, with its config and tokenizer, to a directory that is new."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    config = json.loads((checkpoint / "config.json").read_bytes())
    if "quantization_config" in config:
        raise ValueError(f"{checkpoint} is quantised already; give the 16-bit checkpoint it was made from")
    directory.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".jinja") and file.name != "config.json":
            shutil.copy(file, directory)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config(form)}))
    weight_map: dict[str, str] = {}
    for file in weight_files(checkpoint):
        tensors: Tensors = {}
        for name, dtype, values in read_tensors(file):
            tensors |= quantize_tensor(name, dtype, values, form)
        write_tensors(directory / file.name, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def kv_bytes_per_token(checkpoint: Path, value_bytes: int = 4) -> int:
    """What the keys and values of one token take."""
    config = json.loads((checkpoint / "config.json").read_bytes())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * value_bytes)
