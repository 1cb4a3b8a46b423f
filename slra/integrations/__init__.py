"""Adapters to frameworks; each module is imported only by who asks for it, and this one imports nothing."""

__all__: list[str] = []
