"""Several hosts that serve one model: who they are, that they agree, and what the leader's engine tells the others. Imports no JAX."""
