"""What everything else stands on: errors, files that cannot run code, processes, random numbers without a state, resampling.

Knows tensors and files; knows nothing of models, texts or neurons.
"""
