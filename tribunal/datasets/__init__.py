"""One module per dataset: its public class ``Dataset`` holds the keys of the experiment's ``dataset`` block."""

NOT_EXTENSIONS = frozenset({"answers", "rows"})
"""Modules that the datasets share; ``tribunal.core.registry`` does not offer them as datasets."""
