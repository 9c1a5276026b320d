"""The configuration: its schema, its rules, how it is read, and messages about mistakes in it."""
