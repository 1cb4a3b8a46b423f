"""Hostile arguments for every public function, and what an answer to them has to be."""
