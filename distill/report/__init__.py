"""The report: one JSON truth, readable as Markdown, as a single HTML file, and as a table in the terminal."""

from distill.report.build import SCHEMA_VERSION, build_report
from distill.report.compare import compare_runs, comparison_table, render_comparison
from distill.report.context import ModelEntry, ReportContext
from distill.report.render import render_html, render_markdown, terminal_table, write_report

__all__ = [
    "SCHEMA_VERSION",
    "ModelEntry",
    "ReportContext",
    "build_report",
    "compare_runs",
    "comparison_table",
    "render_comparison",
    "render_html",
    "render_markdown",
    "terminal_table",
    "write_report",
]
