"""Support that every process needs, from ranks and launchers to threads and memory."""
