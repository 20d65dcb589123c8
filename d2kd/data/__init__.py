"""Datasets of a run: registration, checks, and what happens to bad images."""
