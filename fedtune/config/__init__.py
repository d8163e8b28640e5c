"""The one typed config: its schema, and how it is merged from files and flags."""
