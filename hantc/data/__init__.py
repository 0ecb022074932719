"""Datasets, preprocessing and honest splits."""
