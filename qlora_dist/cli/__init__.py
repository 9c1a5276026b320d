"""Commands of `qlora-dist`: their options, and how a command starts and ends its process."""
