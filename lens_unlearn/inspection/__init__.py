"""Text, coloured: what neurons, losses and interventions do at each token.

Knows how to run a model on a text and how to write safe HTML; knows nothing of figures.
"""
