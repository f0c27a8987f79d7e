"""The HTTP front end: OpenAI's and TGI's routes over engines reached through rpc. Never imports jax."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("jaxserve")
except PackageNotFoundError:  # a tree that was not installed
    VERSION = "unknown"
