"""How the demo models were made: the mixture of texts, the training, and the measurements.

Knows transformers and torch; nothing of the package needs it at run time.
"""
