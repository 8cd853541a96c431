"""LoRA adapters from and to PEFT's format, beside the Llama they belong to.

They lie in a folder of their own: transformers takes a folder that holds an
``adapter_config.json`` for the adapters alone.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxplan.config.hugging_face import ADAPTER, PEFT_CONFIG, write_peft_config
from jaxplan.config.schema import ModelConfig
from jaxplan.core.specs import TensorSpec
from jaxplan.models.convert import LAYER
from jaxplan.models.lora import Adapters, input_axes
from jaxplan.models.params import agent_specs, lora_of
from jaxplan.models.tensor_files import Shape, check_tensors, read_tensor

FILE = "adapter_model.safetensors"


class _Entry(NamedTuple):
    """One factor of one layer, on both sides; theirs are [outputs, inputs]."""

    theirs: str
    projection: str
    factor: str  # a field of Adapter
    layer: int
    shape: Shape  # theirs


def check_adapters(folder: Path | str, config: ModelConfig) -> bool:
    """Compare the adapters beside a Llama with the config's; only headers are read.

    Returns:
        Whether there are any.

    Raises:
        ValueError: they differ; everything is listed.
    """
    beside = Path(folder).expanduser() / ADAPTER
    if not (beside / PEFT_CONFIG).exists():
        return False
    shapes = {entry.theirs: entry.shape for entry in _entries(config)}
    check_tensors(beside, shapes, FILE)
    return True


def load_adapters(
    folder: Path | str, config: ModelConfig, shardings: Adapters | None
) -> Adapters | None:
    """Read the adapters that lie beside a Llama; None where none do.

    Args:
        folder: of the Llama.
        config: its shape, and that of the adapters.
        shardings: where each tensor is to lie, in the structure of the adapters; None
            puts all on the first device.

    Raises:
        ValueError: they are not the adapters of this config.
    """
    if not check_adapters(folder, config):
        return None
    file = Path(folder).expanduser() / ADAPTER / FILE
    specs = lora_of(agent_specs(config, 1).llama)
    own = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), specs)
    for entry in _entries(config):
        stacked = getattr(own[entry.projection], entry.factor)
        tensor = read_tensor(file, entry.theirs).astype(np.float32)
        stacked[entry.layer] = tensor.T.reshape(stacked.shape[1:])
    return jax.device_put(own, shardings)


def save_adapters(
    folder: Path | str, config: ModelConfig, adapters: Adapters | None, base: Path
) -> None:
    """Write adapters beside a Llama, in float32; nothing where there are none.

    Args:
        folder: of the Llama.
        config: its shape, and that of the adapters.
        adapters: stacked.
        base: where that folder will be found, for those who look for it.
    """
    if adapters is None:
        return
    beside = Path(folder) / ADAPTER
    beside.mkdir(parents=True)
    own = jax.device_get(adapters)
    tensors = {}
    for entry in _entries(config):
        layer = getattr(own[entry.projection], entry.factor)[entry.layer]
        tensors[entry.theirs] = np.ascontiguousarray(layer.reshape(entry.shape[::-1]).T)
    save_file(tensors, beside / FILE, metadata={"format": "pt"})
    peft = write_peft_config(config.lora, str(base))
    (beside / PEFT_CONFIG).write_text(json.dumps(peft, indent=2) + "\n")


def _entries(config: ModelConfig) -> list[_Entry]:
    specs = lora_of(agent_specs(config, 1).llama) or {}
    names = {entry.ours: entry.theirs.removesuffix(".weight") for entry in LAYER}

    def entry(index: int, projection: str, factor: str, spec: TensorSpec) -> _Entry:
        inputs = input_axes(projection) if factor == "a" else 1
        sides = spec.shape[1 : 1 + inputs], spec.shape[1 + inputs :]
        place = f"base_model.model.model.layers.{index}.{names[projection]}"
        return _Entry(
            theirs=f"{place}.lora_{factor.upper()}.weight",
            projection=projection,
            factor=factor,
            layer=index,
            shape=(math.prod(sides[1]), math.prod(sides[0])),
        )

    return [
        entry(index, projection, factor, spec)
        for index in range(config.layers)
        for projection, adapter in specs.items()
        for factor, spec in vars(adapter).items()
    ]
