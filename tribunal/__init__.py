"""tribunal puts a reasoning model's chain of thought on trial."""

__version__ = "0.1.0"
