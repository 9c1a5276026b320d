"""Modules whose frozen weight is one vector of bytes, in NF4 or in a published format."""
