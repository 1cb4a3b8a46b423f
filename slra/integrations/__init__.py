"""Modules for frameworks. Nothing is imported here: import the one that is wanted, `slra.integrations.torch` say."""

__all__: list[str] = []
