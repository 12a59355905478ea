"""Benchmarks of fxlora against its peers: `bash benchmarks/run.sh`, or `python -m benchmarks`."""
