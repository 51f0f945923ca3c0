"""How a skill is found: one paper a file, each a function from texts to an intervention, with a record in `METHODS`.

Knows statistics, interventions and evaluation; knows nothing of folders, pages or the command line.
"""
