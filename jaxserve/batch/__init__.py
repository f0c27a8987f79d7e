"""Batch generation: a file of prompts in, a file of answers out, in the same order, resumable."""
