"""The schema of what a recipe measures and shows, and of what ``distill fit`` may change."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from distill.data_config import Strict


class BenchConfig(Strict):
    """Latency measurement: batch 1, one thread, interleaved."""

    repeats: int = Field(200, ge=10)
    threads: int = Field(1, ge=1)
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"  # of onnxruntime's graphs and bundles, the teacher's too

    def settings(self) -> dict[str, Any]:
        """As fingerprints see it: the provider is younger than finished runs, and counts if it is not the default."""
        tree = self.model_dump()
        return tree if tree["provider"] != "cpu" else self.model_dump(exclude={"provider"})


class RetrievalConfig(Strict):
    """How well images find their texts and texts their images, and images the names of their classes."""

    prompts: dict[str, list[str]] = {}  # task -> templates such as "a photo of a {}", for zero-shot classes
    logit_scale: float = Field(100.0, gt=0)  # of zero-shot logits: a cosine is multiplied with it


class ReportConfig(Strict):
    """Intervals and figures."""

    bootstrap: int = Field(2000, ge=100)
    examples: int = Field(8, ge=0)
    measured: list[str] = []  # files that bench_bundle.py wrote on devices, of bundles of this run


class FitConfig(Strict):
    """The search of ``distill fit``; no stage of a run reads it."""

    # dotted key, or "precision" -> values, or {low, high, step}; empty: a space that follows from the student
    space: dict[str, list[Any] | dict[str, float]] = {}
