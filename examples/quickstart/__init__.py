"""The quickstart: a small real model, a small real data set, and one command that trains on them."""
