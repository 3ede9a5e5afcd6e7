"""The built-in sections of the report."""
