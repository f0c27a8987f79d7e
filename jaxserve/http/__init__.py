"""The HTTP front end: OpenAI's and TGI's routes over engines reached through rpc. Never imports jax."""

from importlib.metadata import version

VERSION = version("jaxserve")
