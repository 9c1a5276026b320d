"""Layouts of one model side by side: what they hold, move and take, and that they train the same."""
