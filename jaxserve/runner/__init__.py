"""The device half: KV cache, buckets, sampler and the runner of the steps."""
