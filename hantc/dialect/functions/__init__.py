"""Operators computed by torch functions, one file a family; `registry.py` collects them."""
