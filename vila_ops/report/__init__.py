"""What a run of the pipeline did, for a program (summary.json) and for a person (report.html)."""
