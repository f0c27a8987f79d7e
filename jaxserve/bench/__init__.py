"""Benchmarks with the definitions of `vllm bench`: throughput and latency in this process, serve against a running server."""
