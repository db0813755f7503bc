"""Comparisons as a table for the terminal and as a page for the browser."""

from .html import trained_verdicts, write_report
from .runs import read_run, write_run_report
from .table import metric_table

__all__ = ["metric_table", "read_run", "trained_verdicts", "write_report", "write_run_report"]
