"""One module per task of the activation oracle: its class ``Task`` says what is asked of a trace and what the answer is."""

NOT_EXTENSIONS = frozenset({"task", "addition", "pairs"})
"""Modules that the tasks share; ``tribunal.core.registry`` does not offer them as tasks."""
