"""Configuration of a run, with its schema, rules, reader and error messages."""
