"""The candidate pool: one file per family of replacement operations, and their registry."""
