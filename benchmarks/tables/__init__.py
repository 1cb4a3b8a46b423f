"""What the documentation says of each file of results; `benchmarks.pages` puts it there. No module here measures."""
