"""What is wrong with a machine, or with all machines of a job, before a run finds out."""
