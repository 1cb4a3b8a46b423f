"""Attention as the formula has it, and queries, keys and values to try it on."""
