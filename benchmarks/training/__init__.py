"""Does low-rank, sparse attention train? Tasks, methods, runs and report of the study in ``docs/does_it_work.md``."""
