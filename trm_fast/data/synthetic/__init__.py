"""Tasks that are made rather than collected: ListOps, modular arithmetic, vectors."""
