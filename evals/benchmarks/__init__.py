"""The benchmarks a run can ask: each chooses its questions, scores the answers, and writes them in its own format."""
