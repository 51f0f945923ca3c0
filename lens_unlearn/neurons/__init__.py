"""What neurons did: maps of one value per neuron, and the streamed statistics and attributions that give them.

Knows sites and corpora; knows nothing of how a model is changed.
"""
