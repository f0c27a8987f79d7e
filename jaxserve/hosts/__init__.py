"""Several hosts that serve together: who they are, what each runs, that they agree, and what host 0 and the others tell. Imports no JAX."""
