"""What was lost: scores of a model with and without interventions, and the reports that hold them.

Knows models, corpora and interventions; knows nothing of methods or of how a report is drawn.
"""
