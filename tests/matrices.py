"""Matrices with known spectra, and what holds of an SVD that is right."""
