"""Pages for people: of a pipeline run, with summary.json for programs, of an evaluation and of a comparison."""
