"""The quickstart: one command that trains a small real model on a small real data set."""
