"""Faults tried on real runs and readers: what happens, and what is lost."""
