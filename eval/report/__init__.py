"""The report of one evaluation: ``results.json`` in; ``report.md``, ``report.html`` (one file) and ``plots/`` out."""

from eval.report.read import read_results as read_results
from eval.report.write import write_report as write_report
