"""Seeded demonstrations of the claims of the guide."""
