"""Commands of `qlora-dist`, with their options and the start and end of their processes."""
