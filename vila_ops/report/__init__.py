"""The result of a pipeline run, for programs (summary.json) and for people (report.html)."""
