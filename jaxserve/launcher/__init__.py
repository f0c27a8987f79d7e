"""The parent of all processes: starts, watches, restarts and ends them. Never imports jax."""

from jaxserve.launcher.launcher import launch as launch
