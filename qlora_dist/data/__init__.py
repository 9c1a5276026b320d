"""From files and data sets to batches: sources, chat templates and loss masks, packing, the loader.

Of ranks it knows two numbers, of models nothing.
"""
