"""Several hosts that serve one model: who they are, that they agree, and what the leader's engine tells the others. Imports no JAX."""

from jaxserve.hosts.agreement import agree as agree
from jaxserve.hosts.discovery import discover as discover
from jaxserve.hosts.leader import Leader as Leader
from jaxserve.hosts.worker import Worker as Worker
