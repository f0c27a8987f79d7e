"""jaxserve inside other systems, each an optional extra. Nothing here is imported by the rest."""
