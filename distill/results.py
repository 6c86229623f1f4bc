"""The stages after training: export, quantize, evaluate, bench, report."""
from __future__ import annotations
from pathlib import Path
from typing import Any
from distill.stages import Workspace
def export_graphs(work: Workspace, folder: Path) -> dict[str, Any]: raise NotImplementedError
def quantize_bundle(work: Workspace, folder: Path) -> dict[str, Any]: raise NotImplementedError
def evaluate_all(work: Workspace, folder: Path) -> dict[str, Any]: raise NotImplementedError
def bench_all(work: Workspace, folder: Path) -> dict[str, Any]: raise NotImplementedError
def write_run_report(work: Workspace, folder: Path) -> dict[str, Any]: raise NotImplementedError
